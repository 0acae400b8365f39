// The C interface: arguments are checked here, and nothing is thrown out of it.
#include <cmath>
#include <cstring>
#include <new>

#include "reading.h"

using namespace tinylm;

struct tlm_model {
    Model model;
};
struct tlm_session {
    Generation generation;
};
struct tlm_draft {
    Draft draft;
};

namespace {

void say(char* error, const char* text) {
    if (!error) return;
    std::strncpy(error, text, TLM_ERROR_BYTES - 1);
    error[TLM_ERROR_BYTES - 1] = 0;
}

template <class Call>
int guarded(char* error, Call call) {
    say(error, "");
    try {
        call();
        return TLM_OK;
    } catch (const Error& problem) {
        say(error, problem.text.c_str());
        return problem.status;
    } catch (const std::bad_alloc&) {
        say(error, "out of memory");
        return TLM_MEMORY;
    } catch (const std::exception& problem) {
        say(error, problem.what());
        return TLM_MEMORY;
    }
}

void require(bool good, const char* what) {
    if (!good) fail(TLM_ARGUMENT, "%s", what);
}

void check_ids(const Model& model, const int32_t* tokens, int64_t count) {
    const int vocab = model.constants.vocab;
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= vocab)
            fail(TLM_ARGUMENT, "token %lld is id %d: ids go from 0 to %d", static_cast<long long>(i), tokens[i],
                 vocab - 1);
}

void check_decoder(const Model& model) {
    require(model.decoder(), "this model is an encoder: it fills gaps and cannot continue a text; open a decoder");
    require(model.outputs == model.constants.vocab && model.head.codes && model.constants.head != Head::classes,
            "this model's head gives no logits over tokens: it cannot continue a text");
}

void check_settings(const tlm_settings& s) {
    require(std::isfinite(s.temperature) && s.temperature >= 0, "temperature: must be a number and not negative");
    require(s.top_k >= 0, "top_k: must not be negative; 0 is off");
    require(s.top_p > 0 && s.top_p <= 1, "top_p: must be above 0 and at most 1; 1 is off");
    require(s.min_p >= 0 && s.min_p <= 1, "min_p: must be between 0 and 1; 0 is off");
    require(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0,
            "repetition_penalty: must be above 0; 1 is off");
    require(s.most >= -1, "most: must be a number of tokens, or -1 for no limit");
    require(s.speculate >= 0 && s.speculate <= 7, "speculate: must be between 0 and 7");
}

void describe(const Tensor& from, tlm_tensor* tensor) {
    *tensor = {from.name.data(), static_cast<int32_t>(from.kind), from.rows, from.columns, from.group, from.data,
               from.bytes};
}

}  // namespace

int32_t tlm_version(void) { return TLM_VERSION; }

int tlm_open(const char* path, const tlm_options* options, tlm_model** model, char* error) {
    return guarded(error, [&] {
        require(path && model, "a path and a place for the model are needed");
        Options chosen;
        if (options) chosen = {options->kernels, options->cache, options->screen != 0, options->check != 0};
        require(chosen.cache >= 0 && chosen.cache <= 2, "cache: must be 0 (as the file says), 1 (float32) or 2 (int8)");
        *model = new tlm_model{Model(path, chosen)};
    });
}

void tlm_close(tlm_model* model) { delete model; }

void tlm_info(const tlm_model* model, tlm_facts* facts) {
    const Model& m = model->model;
    const Constants& c = m.constants;
    *facts = {};
    facts->kind = static_cast<int32_t>(c.kind);
    facts->vocab = c.vocab, facts->context = c.context, facts->width = c.width, facts->layers = c.layers;
    facts->heads = c.heads, facts->kv_heads = c.kv_heads, facts->head_width = c.head_width, facts->hidden = c.hidden;
    facts->head = static_cast<int32_t>(c.head);
    facts->classes = c.classes, facts->token_types = c.token_types, facts->known = c.known, facts->begin = c.begin;
    std::copy(std::begin(c.ends), std::end(c.ends), facts->ends);
    facts->outputs = m.outputs;
    facts->cache = m.int8_cache ? 2 : 1;
    facts->screened = m.screened;
    facts->tensors = c.tensors;
    facts->file_bytes = m.file.size(), facts->weight_bytes = m.weight_bytes;
    facts->cache_bytes = Cache(m).position_bytes();
    facts->kernels = m.kernels->name;
}

int tlm_tensor_find(const tlm_model* model, const char* name, tlm_tensor* tensor) {
    const Tensor* found = model->model.file.find(name);
    if (found) describe(*found, tensor);
    return found != nullptr;
}

int tlm_tensor_at(const tlm_model* model, int32_t number, tlm_tensor* tensor) {
    const auto& tensors = model->model.file.tensors();
    if (number < 0 || static_cast<size_t>(number) >= tensors.size()) return 0;
    describe(tensors[number], tensor);
    return 1;
}

int tlm_encode(const tlm_model* model, const char* text, uint64_t bytes, int32_t* ids, int64_t* count, char* error) {
    return guarded(error, [&] {
        const auto& encoder = model->model.encoder;
        std::vector<int32_t> found;
        const bool known = encoder && encoder->encode({text, static_cast<size_t>(bytes)}, found);
        *count = known ? static_cast<int64_t>(found.size()) : -1;
        std::copy(found.begin(), found.end(), ids);
    });
}

int tlm_session_new(const tlm_model* model, int32_t sequences, int32_t threads, tlm_session** session, char* error) {
    return guarded(error, [&] {
        require(sequences >= 1 && sequences <= 65536, "sequences: must be between 1 and 65536");
        require(threads >= 0 && threads <= 1024, "threads: must be between 0 (as many as pay) and 1024");
        *session = new tlm_session{Generation(model->model, sequences, threads)};
    });
}

void tlm_session_free(tlm_session* session) { delete session; }
int32_t tlm_session_threads(const tlm_session* session) { return session->generation.session.threads.count(); }
uint64_t tlm_session_bytes(const tlm_session* session) { return session->generation.session.bytes(); }
void tlm_session_counts(const tlm_session* session, tlm_counts* counts) { *counts = session->generation.counts; }

void tlm_settings_default(tlm_settings* settings) { *settings = {0.8f, 0, 1, 0, 1, 256, 0, 0, 7}; }

int tlm_start(tlm_session* session, int32_t sequence, const int32_t* prompt, int32_t count,
              const tlm_settings* settings, char* error) {
    return guarded(error, [&] {
        Generation& generation = session->generation;
        const Model& model = generation.session.model;
        check_decoder(model);
        require(sequence >= 0 && sequence < generation.texts(), "sequence: this session has no such text");
        require(prompt && count >= 1, "a prompt without tokens cannot be continued; start with the begin token");
        check_ids(model, prompt, count);
        tlm_settings chosen;
        tlm_settings_default(&chosen);
        if (settings) chosen = *settings;
        check_settings(chosen);
        generation.start(sequence, prompt, count, chosen);
    });
}

int tlm_next(tlm_session* session, int32_t most, int32_t milliseconds, int32_t* tokens, int32_t* made, int32_t* ended,
             const volatile int* cancel, char* error) {
    return guarded(error, [&] {
        require(most >= 1 && milliseconds >= 0, "most must be at least 1, milliseconds not negative");
        session->generation.next(most, milliseconds, tokens, made, ended, cancel);
    });
}

int tlm_stop(tlm_session* session, int32_t sequence, char* error) {
    return guarded(error, [&] {
        require(sequence >= 0 && sequence < session->generation.texts(), "sequence: this session has no such text");
        session->generation.stop(sequence);
    });
}

int tlm_draft_learn(const int32_t* tokens, uint64_t count, int32_t vocab, uint64_t most, tlm_draft** draft,
                    char* error) {
    return guarded(error, [&] {
        require(vocab >= 1 && vocab <= 1 << 24, "vocab: must be between 1 and 2^24");
        for (uint64_t i = 0; i < count; i++)
            if (tokens[i] < 0 || tokens[i] >= vocab)
                fail(TLM_ARGUMENT, "token %llu of the corpus is id %d: ids go from 0 to %d",
                     static_cast<unsigned long long>(i), tokens[i], vocab - 1);
        *draft = new tlm_draft{Draft::learn(tokens, count, vocab, most)};
    });
}

int tlm_draft_read(const void* data, uint64_t bytes, tlm_draft** draft, char* error) {
    return guarded(error, [&] { *draft = new tlm_draft{Draft::read(static_cast<const uint8_t*>(data), bytes)}; });
}

void tlm_draft_data(const tlm_draft* draft, const void** data, uint64_t* bytes) {
    *data = draft->draft.bytes().data();
    *bytes = draft->draft.bytes().size();
}

void tlm_draft_free(tlm_draft* draft) { delete draft; }

int tlm_session_draft(tlm_session* session, const tlm_draft* draft, char* error) {
    return guarded(error, [&] { session->generation.use(draft ? &draft->draft : static_cast<const Draft*>(nullptr)); });
}

int tlm_session_draft_model(tlm_session* session, const tlm_model* model, char* error) {
    return guarded(error, [&] {
        if (model) check_decoder(model->model);
        session->generation.use(model ? &model->model : nullptr);
    });
}

int tlm_forward(tlm_session* session, int32_t texts, const int32_t* lengths, const int32_t* tokens,
                const int32_t* types, int32_t what, float* out, const volatile int* cancel, char* error) {
    return guarded(error, [&] {
        const Model& model = session->generation.session.model;
        require(texts >= 1, "no texts");
        require(what == TLM_FEATURES || what == TLM_OUTPUT, "what: must be TLM_FEATURES or TLM_OUTPUT");
        int64_t total = 0;
        for (int i = 0; i < texts; i++) {
            if (lengths[i] < 1 || lengths[i] > model.constants.context)
                fail(TLM_ARGUMENT, "text %d has %d tokens: the model takes 1 to %d", i, lengths[i],
                     model.constants.context);
            total += lengths[i];
        }
        check_ids(model, tokens, total);
        for (int64_t i = 0; types && i < total; i++)
            if (types[i] < 0 || types[i] >= std::max(1, model.constants.token_types))
                fail(TLM_ARGUMENT, "token type %d: this model has %d", types[i], model.constants.token_types);
        forward(session->generation, texts, lengths, tokens, types, what, out, cancel);
    });
}

int tlm_score(tlm_session* session, const int32_t* tokens, int64_t count, double* logs, const volatile int* cancel,
              char* error) {
    return guarded(error, [&] {
        check_decoder(session->generation.session.model);
        require(count >= 1, "a text without tokens has no score");
        check_ids(session->generation.session.model, tokens, count);
        score(session->generation, tokens, count, logs, cancel);
    });
}

uint32_t tlm_crc32c(const void* data, uint64_t bytes) { return crc32c(static_cast<const uint8_t*>(data), bytes); }
