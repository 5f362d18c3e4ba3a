// See tensor_file.h. Of the archive: local header and bytes of each member, the central directory, its end.
// Of the pickle: protocol 2, a call of torch._utils._rebuild_tensor_v2.
#include "remote/tensor_file.h"

#include <array>
#include <bit>
#include <limits>
#include <string_view>
#include <vector>

#include "base/check.h"

namespace refrag {
namespace {

static_assert(std::endian::native == std::endian::little, "values are written as they lie in memory");

template <typename Integer>
void add_number(std::string& out, Integer value) {
    for (size_t i = 0; i < sizeof(Integer); ++i)
        out += static_cast<char>(static_cast<uint64_t>(value) >> (8 * i) & 0xff);
}

// CRC-32 of zip files: polynomial 0xedb88320, bits reversed.
uint32_t crc32(std::string_view bytes) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> made{};
        for (uint32_t i = 0; i < made.size(); ++i) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ ((value & 1) != 0 ? 0xedb88320u : 0u);
            made[i] = value;
        }
        return made;
    }();
    uint32_t crc = 0xffffffffu;
    for (const char byte : bytes) crc = crc >> 8 ^ table[(crc ^ static_cast<uint8_t>(byte)) & 0xff];
    return ~crc;
}

class Archive {
  public:
    // Its bytes begin at a multiple of `alignment`.
    void add(const std::string& name, std::string_view bytes, size_t alignment = 1) {
        REFRAG_CHECK(out_.size() + bytes.size() + kSlack <= std::numeric_limits<uint32_t>::max(),
                     Status::too_long, "a prompt of ", bytes.size(),
                     " bytes: expected less than 4 GiB for a tensor's file");
        const Member member{name, crc32(bytes), static_cast<uint32_t>(bytes.size()),
                            static_cast<uint32_t>(out_.size())};
        constexpr size_t header_bytes = 30, field_bytes = 4;
        const size_t begin = out_.size() + header_bytes + name.size();
        // The filler is an extra field, as torch names it.
        const size_t filler =
            alignment == 1 ? 0 : (alignment - (begin + field_bytes) % alignment) % alignment;
        add_number<uint32_t>(out_, 0x04034b50);
        add_common(out_, member, alignment == 1 ? 0 : field_bytes + filler);
        out_ += name;
        if (alignment != 1) {
            out_ += "FB";
            add_number(out_, static_cast<uint16_t>(filler));
            out_.append(filler, 'Z');
        }
        out_ += bytes;
        members_.push_back(member);
    }

    std::string take() {
        const size_t begin = out_.size();
        for (const Member& member : members_) {
            add_number<uint32_t>(out_, 0x02014b50);
            add_number<uint16_t>(out_, 0);  // made by
            add_common(out_, member, 0);
            add_number<uint16_t>(out_, 0);  // comment's length
            add_number<uint16_t>(out_, 0);  // disk
            add_number<uint16_t>(out_, 0);  // attributes
            add_number<uint32_t>(out_, 0);
            add_number(out_, member.at);
            out_ += member.name;
        }
        const size_t end = out_.size();
        const auto n = static_cast<uint16_t>(members_.size());
        add_number<uint32_t>(out_, 0x06054b50);
        add_number<uint32_t>(out_, 0);  // disks
        add_number(out_, n);
        add_number(out_, n);
        add_number(out_, static_cast<uint32_t>(end - begin));
        add_number(out_, static_cast<uint32_t>(begin));
        add_number<uint16_t>(out_, 0);
        return std::move(out_);
    }

  private:
    static constexpr size_t kSlack = 4096;  // headers and directory
    struct Member {
        std::string name;
        uint32_t crc;
        uint32_t size;
        uint32_t at;
    };
    static void add_common(std::string& out, const Member& member, size_t extra_bytes) {
        add_number<uint16_t>(out, 0);       // version
        add_number<uint16_t>(out, 0);       // flags
        add_number<uint16_t>(out, 0);       // stored
        add_number<uint16_t>(out, 0);       // time
        add_number<uint16_t>(out, 0x0021);  // date: 1 January 1980
        add_number(out, member.crc);
        add_number(out, member.size);
        add_number(out, member.size);
        add_number(out, static_cast<uint16_t>(member.name.size()));
        add_number(out, static_cast<uint16_t>(extra_bytes));
    }

    std::string out_;
    std::vector<Member> members_;
};

// The opcodes of pickle that are needed.
class Pickle {
  public:
    Pickle() : out_("\x80\x02") {}
    Pickle& global(std::string_view module, std::string_view name) {
        out_.append("c").append(module).append("\n").append(name).append("\n");
        return *this;
    }
    Pickle& text(std::string_view value) {
        out_ += 'X';
        add_number(out_, static_cast<uint32_t>(value.size()));
        out_ += value;
        return *this;
    }
    Pickle& integer(int64_t value) {
        if (value >= 0 && value <= 0xff) {
            out_ += 'K';
            add_number(out_, static_cast<uint8_t>(value));
        } else if (value <= std::numeric_limits<int32_t>::max()) {
            out_ += 'J';
            add_number(out_, static_cast<int32_t>(value));
        } else {
            out_ += "\x8a\x08";
            add_number(out_, value);
        }
        return *this;
    }
    Pickle& op(std::string_view codes) {
        out_ += codes;
        return *this;
    }
    std::string take() { return std::move(out_); }

  private:
    std::string out_;
};

std::string tensor_pickle(int64_t n_rows, int64_t dim) {
    constexpr std::string_view mark = "(", tuple = "t", pair = "\x86", false_value = "\x89",
                               empty_tuple = ")", call = "R", persistent_id = "Q", stop = ".";
    Pickle pickle;
    pickle.global("torch._utils", "_rebuild_tensor_v2").op(mark);
    pickle.op(mark).text("storage").global("torch", "BFloat16Storage").text("0").text("cpu");
    pickle.integer(n_rows * dim).op(tuple).op(persistent_id);
    pickle.integer(0);
    pickle.integer(n_rows).integer(dim).op(pair);
    pickle.integer(dim).integer(1).op(pair);
    pickle.op(false_value);
    pickle.global("collections", "OrderedDict").op(empty_tuple).op(call);
    pickle.op(tuple).op(call).op(stop);
    return pickle.take();
}

}  // namespace

std::string bf16_tensor_file(std::span<const uint16_t> rows, int64_t n_rows, int64_t dim) {
    REFRAG_DCHECK(std::ssize(rows) == n_rows * dim);
    constexpr size_t alignment = 64;
    Archive archive;
    archive.add("archive/data.pkl", tensor_pickle(n_rows, dim), alignment);
    archive.add("archive/byteorder", "little", alignment);
    archive.add("archive/data/0", {reinterpret_cast<const char*>(rows.data()), rows.size_bytes()}, alignment);
    archive.add("archive/version", "3\n", alignment);
    return archive.take();
}

uint64_t base64_bytes(uint64_t n) {
    return (n + 2) / 3 * 4;
}

void add_base64(std::string& out, std::string_view bytes) {
    static constexpr char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    out.reserve(out.size() + base64_bytes(bytes.size()));
    for (size_t i = 0; i < bytes.size(); i += 3) {
        const size_t n = std::min<size_t>(3, bytes.size() - i);
        uint32_t group = 0;
        for (size_t j = 0; j < 3; ++j) group = group << 8 | (j < n ? static_cast<uint8_t>(bytes[i + j]) : 0u);
        for (size_t j = 0; j < 4; ++j) out += j <= n ? digits[group >> (18 - 6 * j) & 63] : '=';
    }
}

}  // namespace refrag
