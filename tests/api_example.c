/* The C interface in use: a model, two passages, a question. `make test` builds this as C99 and as C++20 and runs it. */
#include <stdio.h>
#include <string.h>

#include "refrag.h"

static int print_text(void *user, const char *text, size_t n_bytes) {
    (void)user;
    return fwrite(text, 1, n_bytes, stdout) == n_bytes;
}

int main(int argc, char **argv) {
    const char *texts[2] = {"The old mill stands on a hill.", "A red lantern hangs over the door."};
    refrag_text question = {"Where is the mill?", 18};
    refrag_error error = {sizeof error, REFRAG_OK, ""};
    refrag_generate_options options;
    refrag_model *model = NULL;
    refrag_passage *passages[2] = {NULL, NULL};
    refrag_request *request = NULL;
    refrag_session *session = NULL;
    refrag_answer *answer = NULL;
    refrag_status status = REFRAG_USAGE;
    size_t i;
    if (argc != 2 || !refrag_abi_matches(REFRAG_ABI_VERSION)) return 2;
    refrag_generate_options_init(&options);
    options.max_new_tokens = 8;
    options.text = print_text;
    status = refrag_model_load(argv[1], NULL, &model, &error);
    for (i = 0; i < 2 && status == REFRAG_OK; ++i)
        status = refrag_passage_new(model, texts[i], strlen(texts[i]), 0, &passages[i], &error);
    if (status == REFRAG_OK) status = refrag_request_new(model, &request, &error);
    if (status == REFRAG_OK)
        status = refrag_request_add_prompt(request, passages, 2, NULL, 0, &question, &error);
    if (status == REFRAG_OK) status = refrag_session_new(model, NULL, &session, &error);
    if (status == REFRAG_OK) status = refrag_session_generate(session, request, &options, &answer, &error);
    if (status != REFRAG_OK) fprintf(stderr, "%s: %s\n", refrag_status_name(status), error.message);
    refrag_answer_free(answer);
    refrag_session_free(session);
    refrag_request_free(request);
    for (i = 0; i < 2; ++i) refrag_passage_free(passages[i]);
    refrag_model_free(model);
    return (int)status;
}
