// Lines of a file, a pipe or standard input as they come: for inputs that need not fit into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace refrag {

class LineStream {
  public:
    // "-": standard input. Status::bad_input where the file is missing, a directory, or not text
    // (foreign_form).
    explicit LineStream(const std::string& path);
    ~LineStream();
    LineStream(const LineStream&) = delete;
    LineStream& operator=(const LineStream&) = delete;

    // The next line without its end (LF or CR LF); valid until the next call. A byte order mark at the start
    // is no part of it. Status::bad_input for a line of more than max_json_line_bytes, Status::runtime where
    // reading fails.
    bool next(std::string_view& line);
    size_t number() const { return number_; }  // of that line, from 1
    uint64_t bytes_read() const { return read_; }
    const std::string& name() const { return name_; }  // for messages
    // The first bytes, for telling forms apart; nothing is consumed.
    std::string_view peek();

  private:
    bool fill();

    std::string name_;
    int descriptor_ = -1;
    bool own_ = false;
    std::string buffer_;
    size_t at_ = 0;        // of buffer_, where the next line begins
    size_t searched_ = 0;  // of buffer_, up to where no line end was found
    uint64_t read_ = 0;
    size_t number_ = 0;
    bool ended_ = false;
    bool begun_ = false;
};

}  // namespace refrag
