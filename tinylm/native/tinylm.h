/* tinylm: the engine for tiny language models, as a plain C interface.
 *
 *     tlm_model* model;
 *     char error[TLM_ERROR_BYTES];
 *     if (tlm_open("story.tlm", NULL, &model, error)) { puts(error); return 1; }
 *     tlm_session* session;
 *     tlm_session_new(model, 1, 0, &session, error);
 *     tlm_start(session, 0, prompt, 4, NULL, error);               // token ids, and settings: NULL takes the defaults
 *     int32_t tokens[16], made, ended = 0;
 *     while (!ended && !tlm_next(session, 16, 0, tokens, &made, &ended, NULL, error))
 *         for (int i = 0; i < made; i++) print_piece(tokens[i]);
 *     tlm_session_free(session);
 *     tlm_close(model);
 *
 * A model is an open file: immutable, shared by any number of threads. A session holds sequences, their caches and its
 * own threads, and is used by one caller at a time. Every call returns TLM_OK or another status, with one sentence in
 * `error` (TLM_ERROR_BYTES of room, or NULL). There is no global state. Pointers that may be NULL say so.
 *
 * Calls that may take long look at `cancel` (may be NULL) between tokens and between pieces of a prompt, and return
 * TLM_CANCELLED when another thread or a signal handler has set it; the session stays usable.
 */
#ifndef TINYLM_H
#define TINYLM_H
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TLM_API __declspec(dllexport)
#else
#define TLM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TLM_ERROR_BYTES 512

/* Number of this interface: another one as soon as a function or a struct changes. */
#define TLM_VERSION 2
TLM_API int32_t tlm_version(void); /* of the library that was loaded */

enum {
    TLM_OK = 0,
    TLM_ARGUMENT = 1,   /* an argument out of its range, or one this model cannot serve */
    TLM_FILE = 2,       /* the file cannot be read, is damaged, or is no .tlm file */
    TLM_MEMORY = 3,     /* out of memory */
    TLM_NUMBERS = 4,    /* the logits are not finite: the weights are damaged or training diverged */
    TLM_CANCELLED = 5,
};

typedef struct tlm_model tlm_model;
typedef struct tlm_session tlm_session;
typedef struct tlm_draft tlm_draft;

/* ---- models ---- */

typedef struct {
    const char* kernels; /* "avx512", "avxvnni", "avx2", "neon", "scalar"; NULL: the best for this processor */
    int32_t cache;       /* keys and values: 0 as the file says, 1 float32, 2 int8 */
    int32_t screen;      /* 0: the whole head for every token; 1: screened where that gives the same tokens sooner */
    int32_t check;       /* 0: leave out the checksum (everything else is checked all the same) */
} tlm_options;

/* `options` NULL: {NULL, 0, 1, 1}. */
TLM_API int tlm_open(const char* path, const tlm_options* options, tlm_model** model, char* error);
TLM_API void tlm_close(tlm_model* model); /* after all its sessions; NULL is allowed */

typedef struct {
    int32_t kind, vocab, context, width, layers, heads, kv_heads, head_width, hidden; /* kind: 0 decoder, 1 encoder */
    int32_t head, classes, token_types; /* head: 0 tied, 1 untied, 2 mlm, 3 classes, 4 none (features) */
    int32_t known;                      /* ids from here on have no text and are never sampled */
    int32_t begin, ends[4];             /* -1: none */
    int32_t outputs;                    /* columns of tlm_forward's TLM_OUTPUT */
    int32_t cache;                      /* 1 float32, 2 int8 */
    int32_t screened;                   /* 1: the head is screened where possible */
    int32_t tensors;
    uint64_t file_bytes, weight_bytes;  /* weight_bytes: what one decoded token reads at most */
    uint64_t cache_bytes;               /* keys and values of one position of one sequence */
    const char* kernels;                /* name of the kernels in use */
} tlm_facts;
TLM_API void tlm_info(const tlm_model* model, tlm_facts* facts);

typedef struct {
    const char* name; /* zero-terminated, lives as long as the model */
    int32_t kind, rows, columns, group;
    const void* data;
    uint64_t bytes;
} tlm_tensor;
/* By name; 1 when there is one, else 0. tlm_tensor_at: by number, in the order of names. */
TLM_API int tlm_tensor_find(const tlm_model* model, const char* name, tlm_tensor* tensor);
TLM_API int tlm_tensor_at(const tlm_model* model, int32_t number, tlm_tensor* tensor);

/* Token ids of a text of `bytes` bytes of UTF-8, without the begin token: those that the `tokenizers` library gives
 * with the file's "tokenizer". `ids` has room for bytes + 1. `count` is how many there are, or -1 where only that
 * library knows: the file has no tensor "merges", or its rules ask for letters and the text has some that are not Latin. */
TLM_API int tlm_encode(const tlm_model* model, const char* text, uint64_t bytes, int32_t* ids, int64_t* count,
                       char* error);

/* ---- sessions ---- */

/* `sequences` texts side by side; `threads` 0: one per 2 MB of weights, at most one per core. */
TLM_API int tlm_session_new(const tlm_model* model, int32_t sequences, int32_t threads, tlm_session** session,
                            char* error);
TLM_API void tlm_session_free(tlm_session* session);
TLM_API int32_t tlm_session_threads(const tlm_session* session);
TLM_API uint64_t tlm_session_bytes(const tlm_session* session); /* memory for caches and buffers */

/* ---- generation ---- */

typedef struct {
    float temperature;        /* 0: the most probable token */
    int32_t top_k;            /* 0: off */
    float top_p;              /* 1: off */
    float min_p;              /* 0: off */
    float repetition_penalty; /* 1: off */
    int32_t most;             /* end after so many new tokens; -1: never */
    uint64_t seed, stream;    /* a text is a function of model, prompt, settings, seed and stream alone */
    int32_t speculate;        /* most tokens drafted per pass, 0 .. 7; changes no text */
} tlm_settings;
TLM_API void tlm_settings_default(tlm_settings* settings); /* 0.8, 0, 1, 0, 1, 256, 0, 0, 7 */

/* Why a text ended. */
enum { TLM_GOES_ON = 0, TLM_END_TOKEN = 1, TLM_MOST = 2 };

/* Begin the text of one sequence with `count` >= 1 prompt tokens; computes nothing yet. What the cache holds of an
 * earlier text with the same beginning is used again. `settings` NULL: the defaults. */
TLM_API int tlm_start(tlm_session* session, int32_t sequence, const int32_t* prompt, int32_t count,
                      const tlm_settings* settings, char* error);

/* Go on with every text that was started and has not ended, until one of them has `most` new tokens, or a pass ends
 * after `milliseconds` (0: no limit). Of sequence i, tokens[i * most ..] are the new ones, made[i] their number and
 * ended[i] why it ended; an end token is not among them. TLM_NUMBERS ends all texts. */
TLM_API int tlm_next(tlm_session* session, int32_t most, int32_t milliseconds, int32_t* tokens, int32_t* made,
                     int32_t* ended, const volatile int* cancel, char* error);

/* Ends the text of one sequence here; the others go on. */
TLM_API int tlm_stop(tlm_session* session, int32_t sequence, char* error);

typedef struct {
    uint64_t passes, tokens;      /* decoding passes of one or more sequences, and tokens they gave */
    uint64_t drafted, accepted;   /* by speculation */
    uint64_t asked, taken;        /* of these, what a smaller model drafted */
    uint64_t screened, rescored;  /* tokens chosen by the screened head, and rows it computed exactly */
} tlm_counts;
TLM_API void tlm_session_counts(const tlm_session* session, tlm_counts* counts);

/* ---- drafts: what usually follows in a corpus, for speculation ---- */

/* From a corpus of token ids in 0 .. vocab - 1; keeps at most `most` entries of 8 bytes (0: all that occur twice). */
TLM_API int tlm_draft_learn(const int32_t* tokens, uint64_t count, int32_t vocab, uint64_t most, tlm_draft** draft,
                            char* error);
/* From what tlm_draft_data gave, copied. */
TLM_API int tlm_draft_read(const void* data, uint64_t bytes, tlm_draft** draft, char* error);
TLM_API void tlm_draft_data(const tlm_draft* draft, const void** data, uint64_t* bytes);
TLM_API void tlm_draft_free(tlm_draft* draft);
/* Used by the session from now on, and must outlive it; NULL: none. By default a file's own table ("grams") is. */
TLM_API int tlm_session_draft(tlm_session* session, const tlm_draft* draft, char* error);

/* Where these know nothing, `model` drafts: a smaller one with the same tokens, which must outlive the session; NULL:
 * none. Only in sessions of one sequence. */
TLM_API int tlm_session_draft_model(tlm_session* session, const tlm_model* model, char* error);

/* ---- reading whole texts: logits, features, classes ---- */

enum {
    TLM_FEATURES = 0, /* after the last norm: width columns, one row per token */
    TLM_OUTPUT = 1,   /* the head's: vocab columns, one row per token; "classes": one row per text; "none": features */
};

/* `texts` texts of lengths[i] tokens each (1 .. context), one after the other in `tokens`; `types` are BERT's token
 * types (NULL: zeros). `out` gets the rows of all texts, one after the other. */
TLM_API int tlm_forward(tlm_session* session, int32_t texts, const int32_t* lengths, const int32_t* tokens,
                        const int32_t* types, int32_t what, float* out, const volatile int* cancel, char* error);

/* logs[i] = natural log of the probability of tokens[i] after those before it, logs[0] = 0. A text longer than the
 * context is seen as generation sees it: whenever it fills the context, its oldest half is dropped. Decoders only. */
TLM_API int tlm_score(tlm_session* session, const int32_t* tokens, int64_t count, double* logs,
                      const volatile int* cancel, char* error);

TLM_API uint32_t tlm_crc32c(const void* data, uint64_t bytes); /* the file's checksum, for writers */

#ifdef __cplusplus
}
#endif
#endif
