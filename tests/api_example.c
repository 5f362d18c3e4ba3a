/* The C interface in use: a model, two passages, a question. `make test` builds this as C99 and as C++20 and
 * runs it. */
#include <stdio.h>
#include <string.h>

#include "refrag.h"

static int print_text(void* user, const char* text, size_t n_bytes) {
    return fwrite(text, 1, n_bytes, (FILE*)user) == n_bytes; /* 0 would end the answer */
}

int main(int argc, char** argv) {
    const char* river = "The Urvik is a river. It is 734 km long and ends in a lake.";
    const char* mill = "The mill of Orrin was built in 1871 by Ada Tolm.";
    const refrag_text question = {"How long is the Urvik?", 22};
    refrag_model* model = NULL;
    refrag_passage* passages[2] = {NULL, NULL};
    refrag_request* request = NULL;
    refrag_session* session = NULL;
    refrag_answer* answer = NULL;
    refrag_error error = {sizeof error, REFRAG_OK, ""};
    refrag_generate_options options;
    refrag_generate_options_init(&options, sizeof options);
    options.text = print_text;
    options.user = stdout;
    if (argc != 2 || !refrag_abi_matches(REFRAG_ABI_VERSION)) return 2;
    /* REFRAG_OK is 0: the first call that fails is the last. */
    if (refrag_model_load(argv[1], NULL, &model, &error) ||
        refrag_passage_new(model, river, strlen(river), 0, &passages[0], &error) ||
        refrag_passage_new(model, mill, strlen(mill), 0, &passages[1], &error) ||
        refrag_request_new(model, &request, &error) ||
        refrag_request_add_prompt(request, passages, 2, NULL, 0, &question, &error) ||
        refrag_session_new(model, NULL, &session, &error) ||
        refrag_session_generate(session, request, &options, &answer, &error))
        fprintf(stderr, "%s: %s\n", refrag_status_name(error.status), error.message);
    refrag_answer_free(answer);
    refrag_session_free(session);
    refrag_request_free(request);
    refrag_passage_free(passages[0]);
    refrag_passage_free(passages[1]);
    refrag_model_free(model);
    return (int)error.status;
}
