// See metrics.h.
#include "server/metrics.h"

#include <algorithm>

#include "base/check.h"

namespace refrag {

void Histogram::observe(double seconds, int64_t times) {
    const auto at = std::lower_bound(bounds.begin(), bounds.end(), seconds) - bounds.begin();
    counts_[static_cast<size_t>(at)] += times;
    sum_ns_ += static_cast<int64_t>(seconds * 1e9) * times;
}

void Histogram::write(std::string& out, std::string_view name, std::string_view help) const {
    out += str("# HELP ", name, " ", help, "\n# TYPE ", name, " histogram\n");
    int64_t n = 0;
    for (size_t i = 0; i < bounds.size(); ++i) {
        n += counts_[i];
        out += str(name, "_bucket{le=\"", bounds[i], "\"} ", n, "\n");
    }
    n += counts_[bounds.size()];
    out += str(name, "_bucket{le=\"+Inf\"} ", n, "\n", name, "_sum ", static_cast<double>(sum_ns_) / 1e9,
               "\n", name, "_count ", n, "\n");
}

void Metrics::count_response(std::string_view route, int status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++responses_[{std::string(route), status}];
}

void Metrics::count_answer(const Answer& answer) {
    prompt_tokens += static_cast<int64_t>(answer.plain_tokens);
    prompt_positions += static_cast<int64_t>(answer.positions);
    generated_tokens += std::ssize(answer.ids);
    chunks += std::ssize(answer.chunks);
    chunks_expanded += static_cast<int64_t>(answer.n_expanded);
    chunks_cached += static_cast<int64_t>(answer.n_cached);
    if (answer.ttft_ms > 0.0) ttft.observe((answer.times.queue + answer.ttft_ms) / 1000.0);
}

std::string Metrics::text(const SchedulerStats& scheduler, size_t n_connections, size_t n_passages,
                          const PassageCache& cache) const {
    std::string out;
    const auto write = [&out](std::string_view name, std::string_view type, std::string_view help,
                              auto value) {
        out += str("# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n", name, " ", value, "\n");
    };
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        out +=
            "# HELP refrag_http_responses_total Responses by route and status\n"
            "# TYPE refrag_http_responses_total counter\n";
        for (const auto& [key, n] : responses_)
            out += str("refrag_http_responses_total{route=\"", key.first, "\",status=\"", key.second, "\"} ",
                       n, "\n");
    }
    ttft.write(out, "refrag_time_to_first_token_seconds",
               "From arrival to the first token, the queue included");
    ttit.write(out, "refrag_time_per_output_token_seconds", "Between tokens of an answer");
    total.write(out, "refrag_request_seconds", "From arrival to the end of the response");
    const EngineStats& engine = scheduler.engine;
    const char* gauge = "gauge";
    const char* counter = "counter";
    write("refrag_http_connections", gauge, "Connections that are open", n_connections);
    write("refrag_requests_pending", gauge, "Requests that were accepted and have not ended",
          scheduler.n_pending);
    write("refrag_requests_waiting", gauge, "Of these, without a slot", engine.n_waiting);
    write("refrag_requests_preparing", gauge, "Of these, whose prompt is being made", engine.n_preparing);
    write("refrag_requests_running", gauge, "Of these, that read a prompt or generate", engine.n_running);
    write("refrag_encodings_pending", gauge, "Calls that only encode and have not ended",
          scheduler.n_encoding);
    write("refrag_slots", gauge, "Requests that can run at a time", engine.n_slots);
    write("refrag_step_rows", gauge, "Prompt rows of a step beside answers (--step-ms)", scheduler.step_rows);
    write("refrag_kv_pages", gauge, "Pages of the KV cache", engine.kv_blocks);
    write("refrag_kv_pages_used", gauge, "Of these, of requests that run", engine.kv_blocks_used);
    write("refrag_kv_pages_kept", gauge, "Of these, of prefixes that are kept", engine.kv_blocks_kept);
    write("refrag_kv_bytes", gauge, "Memory of the KV cache", scheduler.kv_bytes);
    write("refrag_passages", gauge, "Passages that clients have put", n_passages);
    write("refrag_passage_cache_passages", gauge, "Passages that are kept with their embeddings",
          cache.size());
    write("refrag_passage_cache_bytes", gauge, "Memory that they take", cache.bytes());
    write("refrag_steps_total", counter, "Steps of the decoder", engine.steps);
    write("refrag_steps_redone_total", counter, "Steps that failed and were done again", engine.steps_redone);
    write("refrag_requests_finished_total", counter, "Requests that were answered", engine.finished);
    write("refrag_requests_failed_total", counter, "Requests that ended with an error", engine.failed);
    write("refrag_requests_expired_total", counter, "Requests whose time was over", engine.expired);
    write("refrag_requests_cancelled_total", counter, "Requests whose client left", engine.cancelled);
    write("refrag_prefix_hits_total", counter, "Prompts that took over positions of earlier ones",
          engine.prefix_hits);
    write("refrag_prefix_rows_reused_total", counter, "Positions that they took over", engine.rows_reused);
    write("refrag_prefill_rows_total", counter, "Positions of prompts that the decoder read",
          engine.rows_prefilled);
    write("refrag_prompt_tokens_total", counter, "Prompts as plain tokens", prompt_tokens.load());
    write("refrag_prompt_positions_total", counter, "Decoder positions in their place",
          prompt_positions.load());
    write("refrag_generated_tokens_total", counter, "Tokens generated", generated_tokens.load());
    write("refrag_chunks_total", counter, "Chunks of passages in prompts", chunks.load());
    write("refrag_chunks_expanded_total", counter, "Of these, read as tokens", chunks_expanded.load());
    write("refrag_chunks_cached_total", counter, "Of these, encoded before", chunks_cached.load());
    write("refrag_clients_left_total", counter, "Clients that left before their response's end",
          clients_left.load());
    return out;
}

}  // namespace refrag
