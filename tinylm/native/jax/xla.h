// XLA's binary interface for custom calls (its "typed FFI", version 0.3), as much of it as our handlers use.
//
// Declared here from its specification, so that a build needs neither XLA's headers nor a copy of them. Later minor
// versions only append to these structures; a library with another major version refuses our handlers when they are registered.
#pragma once
#include <cstdint>
#include <cstring>
#include <string_view>

namespace tinylm::xla {

constexpr int MAJOR = 0, MINOR = 3;
enum DataType : int32_t { BOOL = 1, I32 = 4, I64 = 5, F32 = 11, BF16 = 16 };

struct Extension {
    size_t size;
    int32_t type;  // 1: Metadata
    Extension* next;
};
struct Version {
    size_t size;
    Extension* extension;
    int32_t major, minor;
};
struct Metadata {
    size_t size;
    Version version;
    uint32_t traits;
    int64_t state_type;
};
struct MetadataExtension {
    Extension base;
    Metadata* metadata;
};

struct Buffer {
    size_t size;
    Extension* extension;
    int32_t dtype;
    void* data;
    int64_t rank;
    int64_t* dims;
};
struct Buffers {
    size_t size;
    Extension* extension;
    int64_t count;
    int32_t* types;
    Buffer** buffers;
};
struct Text {
    const char* at;
    size_t length;
};
struct Scalar {
    int32_t dtype;
    void* value;
};
struct Attributes {
    size_t size;
    Extension* extension;
    int64_t count;
    int32_t* types;
    Text** names;
    Scalar** values;  // where the type is a scalar, as all of ours are
};

struct Context;  // of one execution
struct Error;
struct Failure {
    size_t size;
    Extension* extension;
    const char* message;
    int32_t code;
};
struct Schedule {
    size_t size;
    Extension* extension;
    Context* context;
    void (*task)(void*);
    void* data;
};
struct CountThreads {
    size_t size;
    Extension* extension;
    Context* context;
    int64_t* count;
};
struct Api {
    size_t size;
    Extension* extension;
    Version version;
    const void* internal;
    Error* (*fail)(Failure*);
    const void* unused[10];
    Error* (*schedule)(Schedule*);
    Error* (*count_threads)(CountThreads*);
};

// What a handler is called with.
struct Frame {
    size_t size;
    Extension* extension;
    const Api* api;
    Context* context;
    int32_t stage;
    Buffers args, results;
    Attributes attributes;

    const Buffer& arg(int64_t i) const { return *args.buffers[i]; }
    const Buffer& result(int64_t i) const { return *results.buffers[i]; }

    // The setting of this name, which the Python side always gives; its type is checked there.
    template <class T>
    T setting(std::string_view name) const {
        T value{};
        for (int64_t i = 0; i < attributes.count; i++)
            if (std::string_view(attributes.names[i]->at, attributes.names[i]->length) == name)
                std::memcpy(&value, attributes.values[i]->value, sizeof value);
        return value;
    }

    // Asked for what the handler is, instead of called? Then the answer has been given.
    bool asked() const {
        if (!extension || extension->type != 1) return false;
        Metadata& about = *reinterpret_cast<MetadataExtension*>(extension)->metadata;
        about.version = {sizeof(Version), nullptr, MAJOR, MINOR};
        about.traits = 0;
        return true;
    }

    Error* out_of_memory() const {
        Failure failure{sizeof failure, nullptr, "no memory for the intermediate values of a training step", 8};
        return api->fail(&failure);
    }

    int64_t threads() const {
        int64_t count = 1;
        CountThreads ask{sizeof ask, nullptr, context, &count};
        return api->count_threads(&ask) ? 1 : count;  // an error says that there is no pool
    }

    void schedule(void (*task)(void*), void* data) const {
        Schedule ask{sizeof ask, nullptr, context, task, data};
        if (api->schedule(&ask)) task(data);
    }
};

}  // namespace tinylm::xla
