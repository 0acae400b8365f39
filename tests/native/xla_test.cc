// The structures of training/xla.h lie in memory as those of XLA's own headers: compiled, never run.
#include <cstddef>

#include "../../tinylm/native/jax/xla.h"
#include "xla/ffi/api/c_api.h"

using namespace tinylm::xla;

template <class Ours, class Theirs>
constexpr bool same_size = sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs);

static_assert(MAJOR == XLA_FFI_API_MAJOR && MINOR <= XLA_FFI_API_MINOR);
static_assert(F32 == int(XLA_FFI_DataType_F32) && BF16 == int(XLA_FFI_DataType_BF16));
static_assert(same_size<Extension, XLA_FFI_Extension_Base> && same_size<Version, XLA_FFI_Api_Version>);
static_assert(same_size<Metadata, XLA_FFI_Metadata> && same_size<MetadataExtension, XLA_FFI_Metadata_Extension>);
static_assert(same_size<Buffer, XLA_FFI_Buffer> && same_size<Scalar, XLA_FFI_Scalar> && same_size<Text, XLA_FFI_ByteSpan>);
static_assert(same_size<Buffers, XLA_FFI_Args> && same_size<Buffers, XLA_FFI_Rets> && same_size<Attributes, XLA_FFI_Attrs>);
static_assert(same_size<Schedule, XLA_FFI_ThreadPool_Schedule_Args>);
static_assert(same_size<CountThreads, XLA_FFI_ThreadPool_NumThreads_Args>);
static_assert(same_size<Failure, XLA_FFI_Error_Create_Args>);
static_assert(XLA_FFI_Extension_Metadata == 1 && XLA_FFI_Error_Code_RESOURCE_EXHAUSTED == 8);

#define SAME(ours, field, theirs, name) static_assert(offsetof(ours, field) == offsetof(theirs, name))
SAME(Api, fail, XLA_FFI_Api, XLA_FFI_Error_Create);
SAME(Api, schedule, XLA_FFI_Api, XLA_FFI_ThreadPool_Schedule);
SAME(Api, count_threads, XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads);
SAME(Buffer, dtype, XLA_FFI_Buffer, dtype);
SAME(Buffer, data, XLA_FFI_Buffer, data);
SAME(Buffer, dims, XLA_FFI_Buffer, dims);
SAME(Buffers, buffers, XLA_FFI_Args, args);
SAME(Attributes, names, XLA_FFI_Attrs, names);
SAME(Attributes, values, XLA_FFI_Attrs, attrs);
SAME(Metadata, version, XLA_FFI_Metadata, api_version);
SAME(Metadata, traits, XLA_FFI_Metadata, traits);
SAME(Frame, extension, XLA_FFI_CallFrame, extension_start);
SAME(Frame, api, XLA_FFI_CallFrame, api);
SAME(Frame, context, XLA_FFI_CallFrame, ctx);
SAME(Frame, args, XLA_FFI_CallFrame, args);
SAME(Frame, results, XLA_FFI_CallFrame, rets);
SAME(Frame, attributes, XLA_FFI_CallFrame, attrs);

int main() {}
