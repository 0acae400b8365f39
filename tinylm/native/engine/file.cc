#include "file.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "../tinylm.h"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace tinylm {

static_assert(std::endian::native == std::endian::little, "the file is little-endian and used as it is");

namespace {

constexpr char MAGIC[9] = "tinylm\r\n";
constexpr size_t CONSTANTS_AT = 64, TABLE_AT = 320, ENTRY = 112, NAME = 72;
constexpr int LARGEST = 1 << 24;  // of any count: products of three stay inside 64 bits
constexpr int WIDEST = 1 << 16;   // inputs of a matrix: the exact int32 sums hold so many products of bytes

template <class T>
T read(const uint8_t* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

bool zeros(const uint8_t* data, size_t size) {
    return std::all_of(data, data + size, [](uint8_t byte) { return byte == 0; });
}

}  // namespace

void fail(int status, const char* format, ...) {
    char text[TLM_ERROR_BYTES];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Error{status, text};
}

size_t code_bytes(Kind kind, int rows, int columns) {
    const uint64_t outputs = round_up(rows, LANES), inputs = round_up(columns, LANES), weights = outputs * inputs;
    switch (kind) {
    case Kind::floats:
    case Kind::ints: return 4ull * rows * columns;
    case Kind::bytes: return static_cast<uint64_t>(rows) * columns;
    case Kind::panel_float: return 4 * weights;
    case Kind::panel_int8:
    case Kind::panel_planes: return weights;
    case Kind::panel_int4: return weights / 2;
    case Kind::panel_ternary: return weights / 4;
    case Kind::packed_ternary: return (weights + 4) / 5;
    }
    return 0;
}

size_t tensor_bytes(Kind kind, int rows, int columns, int group) {
    const size_t codes = code_bytes(kind, rows, columns);
    if (!is_panel(kind) || kind == Kind::panel_float) return group ? 0 : codes;
    const uint64_t outputs = round_up(rows, LANES), inputs = round_up(columns, LANES);
    if (group % LANES || group < 0) return 0;
    return round_up(codes, 64) + (group ? 2 * outputs * ((inputs + group - 1) / group) : 4 * outputs);
}

File::File(const char* path, bool check) {
    map(path);
    try {
        check_header(check);
        std::memcpy(&constants_, data_ + CONSTANTS_AT, sizeof constants_);
        check_constants();
        read_table();
    } catch (...) {
        unmap();
        throw;
    }
}

File::~File() { unmap(); }

const Tensor* File::find(std::string_view name) const {
    const auto at =
        std::lower_bound(tensors_.begin(), tensors_.end(), name,
                         [](const Tensor& tensor, std::string_view wanted) { return tensor.name < wanted; });
    if (at == tensors_.end() || at->name != name) return nullptr;
    if (!at->used) at->used = true;  // after opening only read: threads share the file
    return &*at;
}

void File::check_header(bool checksum) const {
    if (size_ < TABLE_AT || size_ % 64) fail(TLM_FILE, "no .tlm file has %zu bytes", size_);
    if (std::memcmp(data_, MAGIC, 8)) fail(TLM_FILE, "this is no .tlm file: it does not begin as one");
    const auto version = read<uint32_t>(data_ + 8);
    if (version != 1)
        fail(TLM_FILE, "version %u of the format: this program reads version 1; export the model anew", version);
    const auto size = read<uint64_t>(data_ + 16);
    if (size != size_)
        fail(TLM_FILE, "the file has %zu bytes and says it should have %llu: a copy was cut short", size_,
             static_cast<unsigned long long>(size));
    if (read<uint32_t>(data_ + 12) || read<uint32_t>(data_ + 28))
        fail(TLM_FILE, "the header's unused bytes are not zero");
    if (!checksum) return;
    const auto expected = read<uint32_t>(data_ + 24), found = crc32c(data_ + 32, size_ - 32);
    if (expected != found)
        fail(TLM_FILE, "damaged: its checksum is %08x and should be %08x; copy it again", found, expected);
}

void File::check_constants() {
    const Constants& c = constants_;
    const auto number = [](const char* name, int value, int least, int most) {
        if (value < least || value > most)
            fail(TLM_FILE, "constant %s = %d: must be between %d and %d", name, value, least, most);
    };
    number("kind", static_cast<int>(c.kind), 0, 1);
    number("vocab", c.vocab, 1, LARGEST);
    number("context", c.context, 1, LARGEST);
    number("width", c.width, 1, WIDEST);
    number("layers", c.layers, 1, WIDEST);
    number("heads", c.heads, 1, WIDEST);
    number("kv_heads", c.kv_heads, 1, c.heads);
    number("head_width", c.head_width, 1, MAX_HEAD_WIDTH);
    number("hidden", c.hidden, 1, WIDEST);
    number("norm", static_cast<int>(c.norm), 0, 1);
    number("block", static_cast<int>(c.block), 0, 2);
    number("mlp", static_cast<int>(c.mlp), 0, 5);
    number("rotary", c.rotary, 0, c.head_width);
    number("qk_norm", c.qk_norm, 0, 1);
    number("head", static_cast<int>(c.head), 0, 4);
    number("classes", c.classes, c.head == Head::classes ? 1 : 0, c.head == Head::classes ? LARGEST : 0);
    number("embed_norm", c.embed_norm, 0, 1);
    number("token_types", c.token_types, 0, LARGEST);
    number("positions", c.learned, 0, 1);
    number("known", c.known, 1, c.vocab);
    number("begin", c.begin, -1, c.known - 1);
    for (const int end : c.ends) number("end", end, -1, c.known - 1);
    number("tensors", c.tensors, 1, static_cast<int>(std::min<size_t>((size_ - TABLE_AT) / ENTRY, LARGEST)));
    if (c.activations != 8 && c.activations != 32)
        fail(TLM_FILE, "constant activations = %d: must be 8 (int8) or 32 (float32)", c.activations);
    number("cache", c.cache, 0, 2);
    number("members", c.members, 1, 1);
    number("pooling", static_cast<int>(c.pooling), 0, c.head == Head::classes ? 2 : 0);
    number("bare", c.bare, 0, c.head == Head::classes ? 1 : 0);
    if (c.heads % c.kv_heads)
        fail(TLM_FILE, "constant heads = %d: not a multiple of kv_heads = %d", c.heads, c.kv_heads);
    if (c.rotary % 2) fail(TLM_FILE, "constant rotary = %d: must be even", c.rotary);
    if (static_cast<int64_t>(c.heads) * c.head_width > WIDEST)
        fail(TLM_FILE, "constants heads = %d, head_width = %d: more than %d together", c.heads, c.head_width, WIDEST);
    const auto real = [](const char* name, float value, bool good) {
        if (!std::isfinite(value) || !good) fail(TLM_FILE, "constant %s = %g cannot be used", name, value);
    };
    real("norm_eps", c.norm_eps, c.norm_eps > 0);
    real("theta", c.theta, c.theta > 0);
    real("attention_scale", c.attention_scale, c.attention_scale > 0);
    real("softcap", c.softcap, c.softcap >= 0);
    if (!zeros(reinterpret_cast<const uint8_t*>(c.unused), sizeof c.unused) ||
        !zeros(reinterpret_cast<const uint8_t*>(c.unused_floats), sizeof c.unused_floats))
        fail(TLM_FILE, "an unused constant is not zero: a newer program wrote this file");
}

void File::read_table() {
    const size_t data_at = TABLE_AT + ENTRY * static_cast<size_t>(constants_.tensors);
    for (int i = 0; i < constants_.tensors; i++) {
        const uint8_t* entry = data_ + TABLE_AT + ENTRY * i;
        const void* end = std::memchr(entry, 0, NAME);
        if (!end || end == entry) fail(TLM_FILE, "tensor %d has no name, or one that does not end", i);
        const std::string_view name(reinterpret_cast<const char*>(entry));
        const char* shown = name.data();
        if (!zeros(entry + name.size(), NAME - name.size()))
            fail(TLM_FILE, "the name of tensor %d is not padded with zeros", i);
        const bool printable = std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c < 127; });
        if (!printable) fail(TLM_FILE, "the name of tensor %d holds characters that no name has", i);
        const auto kind = read<Kind>(entry + 72);
        const int rows = read<int32_t>(entry + 76), columns = read<int32_t>(entry + 80),
                  group = read<int32_t>(entry + 84);
        if (read<uint64_t>(entry + 88)) fail(TLM_FILE, "tensor %s: unused bytes of its entry are not zero", shown);
        const auto offset = read<uint64_t>(entry + 96), bytes = read<uint64_t>(entry + 104);
        const bool known = (kind >= Kind::floats && kind <= Kind::bytes) || is_panel(kind);
        if (!known) fail(TLM_FILE, "tensor %s: kind %d is not known", shown, static_cast<int>(kind));
        const int widest = is_panel(kind) ? WIDEST : kind == Kind::bytes ? INT32_MAX : LARGEST;
        const int least = kind == Kind::bytes ? 0 : 1;
        if (rows < 1 || rows > LARGEST || columns < least || columns > widest || group < 0 || group > WIDEST)
            fail(TLM_FILE, "tensor %s: %d rows, %d columns, groups of %d cannot be", shown, rows, columns, group);
        if (bytes != tensor_bytes(kind, rows, columns, group) || (bytes == 0 && kind != Kind::bytes))
            fail(TLM_FILE, "tensor %s: %llu bytes do not fit its shape", shown, static_cast<unsigned long long>(bytes));
        if (offset % 64 || offset < data_at || offset > size_ || bytes > size_ - offset)
            fail(TLM_FILE, "tensor %s lies outside the file or is not aligned", shown);
        tensors_.push_back({name, kind, rows, columns, group, data_ + offset, bytes});
    }
    std::sort(tensors_.begin(), tensors_.end(), [](const Tensor& a, const Tensor& b) { return a.data < b.data; });
    const uint8_t* end = data_ + data_at;
    for (const Tensor& tensor : tensors_) {  // in the order of the file: no overlap, nothing between them
        if (tensor.data < end) fail(TLM_FILE, "tensor %s overlaps another", tensor.name.data());
        if (!zeros(end, tensor.data - end))
            fail(TLM_FILE, "the bytes before tensor %s are not zero", tensor.name.data());
        end = tensor.data + tensor.bytes;
    }
    if (!zeros(end, data_ + size_ - end)) fail(TLM_FILE, "the bytes after the last tensor are not zero");
    std::sort(tensors_.begin(), tensors_.end(), [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
    const auto twice = std::adjacent_find(tensors_.begin(), tensors_.end(),
                                          [](const Tensor& a, const Tensor& b) { return a.name == b.name; });
    if (twice != tensors_.end()) fail(TLM_FILE, "there are two tensors %s", twice->name.data());
}

#ifdef _WIN32

void File::map(const char* path) {
    wchar_t wide[32768];
    if (!MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, 32768))
        fail(TLM_FILE, "no valid path");
    const HANDLE file = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, 0, nullptr);
    if (file == INVALID_HANDLE_VALUE) fail(TLM_FILE, "cannot be opened: error %lu", GetLastError());
    LARGE_INTEGER size;
    const bool sized = GetFileSizeEx(file, &size) && size.QuadPart > 0;
    const HANDLE mapping = sized ? CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr) : nullptr;
    CloseHandle(file);
    if (!mapping) fail(TLM_FILE, "an empty file, or none that can be mapped");
    data_ = static_cast<const uint8_t*>(MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0));
    CloseHandle(mapping);  // the view keeps it
    if (!data_) fail(TLM_FILE, "cannot be mapped: error %lu", GetLastError());
    size_ = static_cast<size_t>(size.QuadPart);
}

void File::unmap() { UnmapViewOfFile(data_); }

#else

void File::map(const char* path) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(TLM_FILE, "cannot be opened: %s", std::strerror(errno));
    struct stat about {};
    const bool plain = fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0;
    if (!plain) {
        const bool folder = S_ISDIR(about.st_mode);
        close(file);
        if (folder) fail(TLM_FILE, "a folder; the engine runs one file, which `tinylm export FOLDER story.tlm` makes");
        fail(TLM_FILE, "an empty file, or no file");
    }
    int flags = MAP_PRIVATE;
#ifdef MAP_POPULATE
    flags |= MAP_POPULATE;  // all of it is read at once, for the checksum
#endif
    void* data = mmap(nullptr, about.st_size, PROT_READ, flags, file, 0);
    close(file);
    if (data == MAP_FAILED) fail(TLM_FILE, "cannot be mapped: %s", std::strerror(errno));
    data_ = static_cast<const uint8_t*>(data);
    size_ = about.st_size;
}

void File::unmap() { munmap(const_cast<uint8_t*>(data_), size_); }

#endif

}  // namespace tinylm
