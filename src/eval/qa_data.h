// Question files: what `eval qa --data FILE` reads. Two forms, told apart by their content: SQuAD's JSON (1.1
// and 2.0), and JSON Lines of facts, one object with a passage and a question a line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "refrag/passages.h"

namespace refrag {

struct QaQuestion {
    std::string id;  // as in the file, or the line's or SQuAD question's number counted from 1
    std::string question;
    std::vector<std::string> answers;  // gold answers; none: unanswerable
    size_t passage = 0;                // the gold passage, an index into QaData::passages
    // Counted from 1. The turns of a line follow each other in QaData::questions; a line with one question,
    // and a question of SQuAD, is a first turn.
    size_t turn = 1;
};

// Passages that belong together: distractors come from other articles than the gold passage.
struct QaData {
    std::vector<Passage> passages;
    std::vector<size_t> article;        // [n_passages] the article of each, counted from 0
    std::vector<size_t> article_first;  // [n_articles + 1] `by_article` from there to the next article's
    std::vector<size_t> by_article;     // [n_passages] passages, article after article
    std::vector<QaQuestion> questions;
    bool has_turns = false;  // a line has "turns"

    size_t article_size(size_t index) const { return article_first[index + 1] - article_first[index]; }
};

constexpr uint64_t max_qa_bytes = 256ull << 20;

// Reads a question file of at most max_qa_bytes. Throws Error(bad_input) naming file and key or line; a file
// without a question is an error.
QaData read_qa_data(const std::string& path);

// The same from memory; `name` begins the messages. A byte order mark at the start is skipped; keys that are
// not named here are let be. Articles with the same title are one.
//
// SQuAD: one object with "data": [{"title"?, "paragraphs": [{"context", "qas": [{"id"?, "question",
// "answers":
// [{"text", "answer_start"?}], "is_impossible"?}]}]}]. `is_impossible` makes a question unanswerable, and
// only then may "answers" be empty. "answer_start" is not used.
//
// JSON Lines: {"id"?, "title"?, "text" or "passage", "question", "answers": [string, ...] or "answer":
// string} on every line that is not blank. No answers, or the answer "", make a question unanswerable. In
// place of "question" and its answers a line may have "turns": [{"question", "answers" or "answer"}, ...], at
// least one: questions about its passage that follow each other, all with the line's id. Lines
// with the same title and text share their passage; passages with the same title are one article, one without
// a title is an article by itself.
QaData parse_qa_data(std::string_view content, const std::string& name);

}  // namespace refrag
