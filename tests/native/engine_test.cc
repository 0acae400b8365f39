// The native engine without Python, for the sanitizers: threads on one model, cancelled calls, and damaged files.
//
//     engine_test FILE            writes with several sessions at once and compares
//     engine_test FILE N FOLDER   opens and runs N damaged copies, one at a time; prints how many were refused
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "tinylm.h"

namespace {

using Tokens = std::vector<int32_t>;

void expect(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// All that can be done with a model, as far as it can; the tokens it wrote.
Tokens use(const tlm_model* model, int threads, int texts, float temperature) {
    char error[TLM_ERROR_BYTES];
    tlm_facts facts;
    tlm_info(model, &facts);
    tlm_session* session;
    expect(!tlm_session_new(model, texts, threads, &session, error), error);

    Tokens written;
    tlm_settings settings;
    tlm_settings_default(&settings);
    settings.temperature = temperature, settings.most = 40;
    const char text[] = "Once upon a time, there was <|endoftext|> a caf\xC3\xA9 1234's  \xE2\x96\x81.";
    int32_t ids[sizeof text + 1];
    for (const uint64_t bytes : {sizeof text - 1, sizeof text - 5, size_t{10}, size_t{0}}) {
        int64_t count = 0;
        if (tlm_encode(model, text, bytes, ids, &count, error)) continue;
        expect(count <= static_cast<int64_t>(bytes) + 1, "more ids than there is room for");
        for (int64_t i = 0; i < count; i++) expect(ids[i] >= 0 && ids[i] < facts.known, "an id that there is not");
    }
    const Tokens prompt(3, facts.known - 1);
    Tokens tokens(texts * 8), made(texts), ended(texts);
    bool going = true;
    for (int i = 0; i < texts && going; i++) {
        settings.stream = i;
        going = !tlm_start(session, i, prompt.data(), static_cast<int>(prompt.size()), &settings, error);
    }
    while (going) {
        going = !tlm_next(session, 8, 0, tokens.data(), made.data(), ended.data(), nullptr, error);
        for (int i = 0; i < texts && going; i++)
            written.insert(written.end(), tokens.begin() + i * 8, tokens.begin() + i * 8 + made[i]);
        bool all = true;
        for (const int32_t end : ended) all = all && end;
        if (all) break;
    }
    if (facts.context < 1 << 16) {
        const int length = facts.context < 20 ? facts.context : 20;
        const Tokens text(length, 0), lengths{length, 1};
        std::vector<float> out(static_cast<size_t>(length) *
                               (facts.outputs > facts.width ? facts.outputs : facts.width));
        tlm_forward(session, 1, lengths.data(), text.data(), nullptr, TLM_OUTPUT, out.data(), nullptr, error);
        tlm_forward(session, 1, lengths.data(), text.data(), nullptr, TLM_FEATURES, out.data(), nullptr, error);
        std::vector<double> logs(length);
        tlm_score(session, text.data(), length, logs.data(), nullptr, error);
        const int cancel = 1;
        const int status = tlm_score(session, text.data(), length, logs.data(), &cancel, error);
        expect(length == 1 || status != TLM_OK, "a cancelled call says so");
    }
    tlm_session_free(session);
    return written;
}

void work_together(const char* path) {
    char error[TLM_ERROR_BYTES];
    tlm_model* model;
    expect(!tlm_open(path, nullptr, &model, error), error);
    const Tokens expected = use(model, 1, 3, 1.0f);
    expect(!expected.empty(), "nothing was written");
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++)
        threads.emplace_back(
            [&] { expect(use(model, 2, 3, 1.0f) == expected, "another text with other threads around"); });
    for (std::thread& thread : threads) thread.join();

    tlm_session* session;
    tlm_settings settings;
    tlm_settings_default(&settings);
    settings.most = 60;
    int32_t tokens[60], made = 0, ended;
    expect(!tlm_session_new(model, 1, 2, &session, error), error);
    expect(!tlm_session_draft_model(session, model, error), error);
    expect(!tlm_start(session, 0, expected.data(), 1, &settings, error), error);
    while (!tlm_next(session, 60, 0, tokens, &made, &ended, nullptr, error) && !ended) continue;
    expect(ended, error);
    tlm_session_free(session);

    const Tokens corpus(100, 1);
    tlm_draft *learned, *read;
    const void* data;
    uint64_t bytes;
    expect(!tlm_draft_learn(corpus.data(), corpus.size(), 2, 0, &learned, error), error);
    tlm_draft_data(learned, &data, &bytes);
    expect(!tlm_draft_read(data, bytes, &read, error), error);
    tlm_draft_free(learned);
    tlm_draft_free(read);
    tlm_close(model);
}

void put(std::vector<char>& file, size_t at, uint64_t value, int bytes) {
    std::memcpy(file.data() + at, &value, bytes);
}

int damage(const char* path, int count, const std::string& copy) {
    std::ifstream stream(path, std::ios::binary);
    const std::vector<char> whole{std::istreambuf_iterator<char>(stream), {}};
    uint32_t tensors;
    std::memcpy(&tensors, whole.data() + 64 + 4 * 25, 4);
    const size_t table_end = 320 + 112 * static_cast<size_t>(tensors);
    uint64_t state = 1;
    const auto random = [&state](uint64_t below) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (state >> 33) % below;
    };
    int refused = 0;
    for (int i = 0; i < count; i++) {
        std::vector<char> file = whole;
        if (i % 16 == 0) file.resize(random(file.size() / 64) * 64);
        for (uint64_t changes = 1 + random(3); changes && file.size() > table_end; changes--) {
            const size_t at = i % 3 ? random(table_end) : random(file.size());
            const char values[] = {
                0, 1, 127, static_cast<char>(128), static_cast<char>(255), static_cast<char>(random(256))};
            file[at] = values[random(6)];
        }
        if (i % 8 && file.size() > 320) {  // a hostile file has the right checksum
            put(file, 16, file.size(), 8);
            put(file, 24, tlm_crc32c(file.data() + 32, file.size() - 32), 4);
        }
        std::ofstream(copy, std::ios::binary).write(file.data(), static_cast<std::streamsize>(file.size()));
        tlm_model* model = nullptr;
        char error[TLM_ERROR_BYTES];
        if (tlm_open(copy.c_str(), nullptr, &model, error)) {
            refused++;
            expect(error[0] != 0, "a refusal without a reason");
        } else {
            use(model, 1, 1, 0.0f);
            tlm_close(model);
        }
    }
    return refused;
}

}  // namespace

int main(int count, char** arguments) {
    expect(count == 2 || count == 4, "engine_test FILE [N COPY]");
    if (count == 2)
        work_together(arguments[1]);
    else
        std::printf("%d of %s refused\n", damage(arguments[1], std::atoi(arguments[2]), arguments[3]), arguments[2]);
    return 0;
}
