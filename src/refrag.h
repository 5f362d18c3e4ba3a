/* refrag: the C interface of the library, the only public header. C99 and C++.
 *
 * REFRAG (arXiv 2509.01092): retrieved passages are compressed into chunk embeddings, a policy senses which
 * chunks matter for the question, those are expanded back to tokens, and a LLaMA decoder answers.
 *
 *   model     a loaded model directory; never changes, any number of threads and sessions share it
 *   passage   a text, cut and encoded once for all requests that hold it; shareable like a model
 *   request   what the decoder reads, a list of segments in any order: tokens, texts, questions, passages,
 * vectors; any number of sessions may answer it at a time, while nobody adds to it session   an engine with
 * one slot: prompts, KV cache, sampling; one call at a time, a second one is refused answer    what came
 * back: text, ids, times, the story of every chunk
 *
 * Rules that hold for everything here:
 *   - A function that can fail returns a refrag_status and takes a refrag_error to fill in, which may be
 * NULL. After a failure the out-parameters are untouched and every object is as it was before the call.
 *   - Structs of options begin with struct_size: sizeof as the caller's header has it. Their _init function
 * takes it and sets the defaults. So a program that was built with an older header keeps working: fields that
 * it does not know have their defaults. One built with a newer header works too, unless it sets what this
 * library does not know.
 *   - Structs that a function fills in begin with struct_size too, which the caller sets. Fields that this
 * library does not know become 0.
 *   - Texts are UTF-8 with a length in bytes and need no end; any bytes are accepted. Strings in options end
 * with 0.
 *   - What a handle was made from may be freed before it: handles keep what they need.
 *   - Callbacks are called on the thread that called the library, and must not throw or leave by longjmp.
 * They may call the library, but for their own session, which answers REFRAG_USAGE, and may free no handle
 * that is in use.
 *   - The library ends no process, writes to no stream, installs no signal handler and has no global state.
 */
#ifndef REFRAG_H
#define REFRAG_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define REFRAG_API __attribute__((visibility("default")))
#else
#define REFRAG_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The interface's version: raised when something is removed or changes its meaning. Additions keep it. */
#define REFRAG_ABI_VERSION 1

typedef enum refrag_status {
    REFRAG_OK = 0,
    REFRAG_RUNTIME = 1,       /* something failed while running: a device, a prompt that does not fit */
    REFRAG_USAGE = 2,         /* the caller asked for something that makes no sense */
    REFRAG_BAD_INPUT = 3,     /* a file's content is wrong */
    REFRAG_OUT_OF_MEMORY = 4, /* an allocation failed */
    REFRAG_CANCELLED = 5      /* a callback asked to stop */
} refrag_status;

/* Takes a call's status and a failure's message, one line of UTF-8 that ends with 0: what, where, expected,
 * found. A longer one is cut. Set struct_size, as in `refrag_error error = {sizeof error};`. */
typedef struct refrag_error {
    size_t struct_size;
    refrag_status status;
    char message[1000];
} refrag_error;

/* "0.1.0", of the library that runs. */
REFRAG_API const char* refrag_version(void);
/* Whether the library that runs has the interface of this header: pass REFRAG_ABI_VERSION. */
REFRAG_API int refrag_abi_matches(int abi_version);
REFRAG_API const char* refrag_status_name(refrag_status status);

/* ---- model
 * -------------------------------------------------------------------------------------------------- */

typedef struct refrag_model refrag_model;

typedef enum refrag_log_level { REFRAG_LOG_INFO = 0, REFRAG_LOG_WARNING = 1 } refrag_log_level;
/* One line without its end. */
typedef void (*refrag_log_fn)(void* user, refrag_log_level level, const char* line);
/* Bytes of weights read so far, of all. Returns whether to go on (0: REFRAG_CANCELLED). */
typedef int (*refrag_progress_fn)(void* user, uint64_t done, uint64_t total);

typedef struct refrag_model_options {
    size_t struct_size;
    const char* device;          /* "auto" (default), "cpu", "cuda", "cuda:N" */
    int32_t n_threads;           /* of the CPU; 0 (default): all that this process may use */
    int32_t deterministic;       /* one accumulation order whatever the batch (the CPU always) */
    double gpu_memory_fraction;  /* of the GPU's free memory, default 0.9 */
    const char* weights;         /* "auto" (default) or "int8" */
    const char* const* adapters; /* n_adapters directories of PEFT adapters, merged into the decoder */
    size_t n_adapters;
    const char* chat_template;   /* NULL (default): the model's own; plain, llama2, llama3, chatml, mistral */
    const char* system;          /* NULL (default): the template's own; "": no system message */
    refrag_progress_fn progress; /* may be NULL, as all callbacks */
    refrag_log_fn log;
    void* user; /* of both callbacks */
} refrag_model_options;
REFRAG_API void refrag_model_options_init(refrag_model_options* options, size_t struct_size);

/* Loads a model directory, a plain LLaMA (a Hugging Face directory or a GGUF file). options may be NULL. */
REFRAG_API refrag_status refrag_model_load(const char* path, const refrag_model_options* options,
                                           refrag_model** model, refrag_error* error);
REFRAG_API void refrag_model_free(refrag_model* model); /* NULL is nothing, as for all _free */

typedef struct refrag_model_info {
    size_t struct_size;
    int32_t has_encoder; /* 0: a plain decoder, which compresses nothing */
    int32_t chunk_len;   /* k, in tokens */
    double expand_fraction;
    int64_t vocab_size;
    int64_t dim;         /* of the decoder's input rows */
    int64_t d_enc;       /* of chunk embeddings; 0 without an encoder */
    int64_t max_context; /* the decoder's window, in positions */
    int32_t bos_id;      /* -1: none */
    int32_t end_id;
    uint64_t parameters;
    uint64_t weight_bytes;
} refrag_model_info;
REFRAG_API refrag_status refrag_model_get_info(const refrag_model* model, refrag_model_info* info,
                                               refrag_error* error);

/* Ids of a text tokenised alone; with parse_special spellings of special tokens are those tokens. *n_ids
 * takes how many there are, also where `capacity` is smaller; then ids [capacity] is filled as far as it
 * goes, which is no failure. ids may be NULL where capacity is 0. */
REFRAG_API refrag_status refrag_tokenize(const refrag_model* model, const char* text, size_t n_bytes,
                                         int parse_special, int32_t* ids, size_t capacity, size_t* n_ids,
                                         refrag_error* error);
/* The way back, special tokens included; the same rule for `capacity` bytes. */
REFRAG_API refrag_status refrag_detokenize(const refrag_model* model, const int32_t* ids, size_t n_ids,
                                           char* text, size_t capacity, size_t* n_bytes, refrag_error* error);

/* ---- passage
 * ------------------------------------------------------------------------------------------------ */

typedef struct refrag_passage refrag_passage;

/* A passage of this text; cut and encoded when it is first needed, once for all who hold it. chunk_len 0: the
 * model's. */
REFRAG_API refrag_status refrag_passage_new(const refrag_model* model, const char* text, size_t n_bytes,
                                            int32_t chunk_len, refrag_passage** passage, refrag_error* error);
/* From what refrag_passage_save gave for this text. REFRAG_BAD_INPUT where the bytes are torn, changed,
 * another text's or another model's. */
REFRAG_API refrag_status refrag_passage_load(const refrag_model* model, const char* text, size_t n_bytes,
                                             const void* record, size_t record_bytes,
                                             refrag_passage** passage, refrag_error* error);
/* One more holder of the same passage; each frees its own handle. */
REFRAG_API refrag_status refrag_passage_share(const refrag_passage* passage, refrag_passage** other,
                                              refrag_error* error);
REFRAG_API void refrag_passage_free(refrag_passage* passage);

REFRAG_API int refrag_passage_is_encoded(const refrag_passage* passage);
REFRAG_API refrag_status refrag_passage_n_chunks(const refrag_passage* passage, size_t* n_chunks,
                                                 refrag_error* error);
/* Byte span and tokens of chunk `index`. */
REFRAG_API refrag_status refrag_passage_chunk(const refrag_passage* passage, size_t index, size_t* begin,
                                              size_t* end, size_t* n_tokens, refrag_error* error);

/* ---- session
 * ------------------------------------------------------------------------------------------------ */

typedef struct refrag_session refrag_session;

typedef struct refrag_session_options {
    size_t struct_size;
    int64_t max_context; /* positions, prompt and answer together; 0 (default): the decoder's window */
    int32_t
        prefix_cache;  /* prompts that begin alike share the pages of what they have in common; default 1 */
    int64_t step_rows; /* rows of a prompt that are read between two looks at `abort`; 0: the default */
} refrag_session_options;
REFRAG_API void refrag_session_options_init(refrag_session_options* options, size_t struct_size);
REFRAG_API refrag_status refrag_session_new(const refrag_model* model, const refrag_session_options* options,
                                            refrag_session** session, refrag_error* error);
REFRAG_API void refrag_session_free(refrag_session* session);

/* Encodes passages that are not encoded yet, as one batch. */
REFRAG_API refrag_status refrag_session_encode(refrag_session* session, refrag_passage* const* passages,
                                               size_t n_passages, refrag_error* error);
/* An encoded passage's chunk embeddings [n_chunks, d_enc], before projection; the rule of `capacity` as for
 * refrag_tokenize, in floats. */
REFRAG_API refrag_status refrag_session_embeddings(refrag_session* session, const refrag_passage* passage,
                                                   float* values, size_t capacity, size_t* n_values,
                                                   refrag_error* error);
/* An encoded passage as bytes to keep, for refrag_passage_load: chunks and embeddings, these in fp32, with a
 * digest; not the text. The rule of `capacity` as above. */
REFRAG_API refrag_status refrag_passage_save(refrag_session* session, const refrag_passage* passage,
                                             void* record, size_t capacity, size_t* record_bytes,
                                             refrag_error* error);

/* ---- request
 * ------------------------------------------------------------------------------------------------ */

typedef struct refrag_request refrag_request;

REFRAG_API refrag_status refrag_request_new(const refrag_model* model, refrag_request** request,
                                            refrag_error* error);
REFRAG_API void refrag_request_free(refrag_request* request);

/* Segments are read in the order in which they are added; each text is tokenised alone. */
REFRAG_API refrag_status refrag_request_add_tokens(refrag_request* request, const int32_t* ids, size_t n_ids,
                                                   refrag_error* error);
REFRAG_API refrag_status refrag_request_add_text(refrag_request* request, const char* text, size_t n_bytes,
                                                 int parse_special, refrag_error* error);
/* Tokens too, and what a policy that sees the question sees. */
REFRAG_API refrag_status refrag_request_add_question(refrag_request* request, const char* text,
                                                     size_t n_bytes, refrag_error* error);
/* A passage's chunks. expanded [n_expanded], one for each chunk: 0 compressed, else as tokens; NULL with 0:
 * the request's policy chooses. */
REFRAG_API refrag_status refrag_request_add_passage(refrag_request* request, const refrag_passage* passage,
                                                    const uint8_t* expanded, size_t n_expanded,
                                                    refrag_error* error);
/* Chunk embeddings [n_rows, d_enc] from elsewhere: projected, a position each. */
REFRAG_API refrag_status refrag_request_add_chunk_embeddings(refrag_request* request, const float* values,
                                                             size_t n_rows, refrag_error* error);
/* Rows of the decoder's input [n_rows, dim] as they are. */
REFRAG_API refrag_status refrag_request_add_vectors(refrag_request* request, const float* values,
                                                    size_t n_rows, refrag_error* error);

/* A text of a conversation. */
typedef struct refrag_text {
    const char* text;
    size_t n_bytes;
} refrag_text;
/* Adds a whole prompt in the model's template: passages, earlier turns (history [2 * n_turns]: question,
 * answer, ..., oldest first), the question. */
REFRAG_API refrag_status refrag_request_add_prompt(refrag_request* request, refrag_passage* const* passages,
                                                   size_t n_passages, const refrag_text* history,
                                                   size_t n_turns, const refrag_text* question,
                                                   refrag_error* error);

/* ---- generation
 * --------------------------------------------------------------------------------------------- */

typedef struct refrag_answer refrag_answer;

/* Text as it is generated, whole characters where it holds whole ones. Returns whether to go on. */
typedef int (*refrag_text_fn)(void* user, const char* text, size_t n_bytes);
/* Asked before every step of a prompt and of an answer. Returns whether to go on. */
typedef int (*refrag_continue_fn)(void* user);

typedef struct refrag_generate_options {
    size_t struct_size;
    int32_t max_new_tokens; /* default 256; -1: to an end token, or the context is full; 0: read the prompt
                               alone */
    double expand_fraction; /* p; negative (default): the model's */
    const char*
        policy; /* NULL (default): the model's; model, none, all, random, bm25, recent, perplexity-asc|desc */
    const char* unexpanded;   /* NULL (default): the model's; compress, drop */
    float temperature;        /* default 0: greedy */
    int32_t top_k;            /* default 0: all */
    float top_p;              /* default 1 */
    float min_p;              /* default 0 */
    float repetition_penalty; /* default 1 */
    float frequency_penalty;  /* default 0 */
    float presence_penalty;   /* default 0 */
    int32_t repeat_last_n;    /* default: the command line's */
    uint64_t seed;            /* default 0 */
    const char* const* stop;  /* n_stop texts that end the answer */
    size_t n_stop;
    int32_t ignore_eos;  /* end tokens are never sampled */
    int64_t deadline_ms; /* from the call on; 0 (default): none. Past it the answer ends as far as it came. */
    refrag_text_fn text; /* may be NULL, as all callbacks */
    refrag_continue_fn keep_on;
    void* user; /* of both callbacks */
} refrag_generate_options;
REFRAG_API void refrag_generate_options_init(refrag_generate_options* options, size_t struct_size);

/* Answers. options may be NULL. The request can be asked again, and by other sessions of its model. After
 * `text` asked to stop the answer is there as far as it came, with REFRAG_FINISH_CANCELLED; after keep_on did
 * there is none, and the status is REFRAG_CANCELLED. */
REFRAG_API refrag_status refrag_session_generate(refrag_session* session, const refrag_request* request,
                                                 const refrag_generate_options* options,
                                                 refrag_answer** answer, refrag_error* error);

typedef enum refrag_finish {
    REFRAG_FINISH_END = 0,       /* an end token */
    REFRAG_FINISH_STOP = 1,      /* a stop text */
    REFRAG_FINISH_LENGTH = 2,    /* max_new_tokens */
    REFRAG_FINISH_CONTEXT = 3,   /* the context is full */
    REFRAG_FINISH_CANCELLED = 4, /* a callback */
    REFRAG_FINISH_DEADLINE = 5
} refrag_finish;

typedef struct refrag_answer_info {
    size_t struct_size;
    refrag_finish finish;
    size_t n_chunks;
    size_t n_expanded;     /* chunks read as tokens */
    size_t n_cached;       /* that were encoded before */
    size_t n_positions;    /* of the prompt, in the decoder */
    size_t n_reused;       /* of those, taken over from an earlier prompt */
    size_t n_plain_tokens; /* what the same prompt takes as tokens */
    size_t n_new_tokens;
    double ttft_ms;      /* to the first token */
    double tokens_per_s; /* of those after the first */
} refrag_answer_info;
REFRAG_API refrag_status refrag_answer_get_info(const refrag_answer* answer, refrag_answer_info* info,
                                                refrag_error* error);
/* Valid until the answer is freed; ends with 0, which *n_bytes does not count. */
REFRAG_API const char* refrag_answer_text(const refrag_answer* answer, size_t* n_bytes);
REFRAG_API const int32_t* refrag_answer_ids(const refrag_answer* answer, size_t* n_ids);

typedef struct refrag_chunk_info {
    size_t struct_size;
    size_t segment;    /* of the request */
    size_t begin, end; /* byte span in the passage's text */
    size_t n_tokens;
    int32_t has_logit;
    float logit; /* the policy's score */
    int32_t expanded;
    int32_t cached;
    int32_t position; /* its first in the decoder */
    int32_t n_positions;
} refrag_chunk_info;
REFRAG_API refrag_status refrag_answer_chunk(const refrag_answer* answer, size_t index,
                                             refrag_chunk_info* info, refrag_error* error);
REFRAG_API void refrag_answer_free(refrag_answer* answer);

#ifdef __cplusplus
}
#endif

#endif
