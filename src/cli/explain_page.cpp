// See explain_page.h.
#include "cli/explain_page.h"

#include <algorithm>

#include "base/sha256.h"
#include "io/base64.h"

namespace refrag {
namespace {

constexpr std::string_view kStyle =
#include "cli/explain_style.inl"
    ;
constexpr std::string_view kBody =
#include "cli/explain_body.inl"
    ;
constexpr std::string_view kScript =
#include "cli/explain_script.inl"
#include "cli/explain_script_views.inl"
    ;

// The source expression by which a content security policy allows this text alone.
std::string csp_hash(std::string_view text) {
    const Sha256Digest digest = Sha256().add(text).digest();
    return "'sha256-" + base64_encode(digest.view()) + "'";
}

// JSON as the text of a script element: `<` occurs within strings alone, and is the only character that could
// end the element; U+2028 and U+2029 end lines in old scripts.
std::string for_script(std::string_view json) {
    std::string out;
    out.reserve(json.size());
    for (size_t at = 0; at < json.size(); ++at) {
        const std::string_view rest = json.substr(at);
        if (rest.starts_with('<')) {
            out += "\\u003c";
        } else if (rest.starts_with("\xE2\x80\xA8") || rest.starts_with("\xE2\x80\xA9")) {
            out += rest[2] == '\xA8' ? "\\u2028" : "\\u2029";
            at += 2;
        } else {
            out.push_back(rest[0]);
        }
    }
    return out;
}

}  // namespace

bool is_page_path(std::string_view path) {
    const std::string_view name = path.substr(path.find_last_of('/') + 1);
    const size_t dot = name.rfind('.');
    if (dot == std::string_view::npos) return false;
    std::string ending(name.substr(dot + 1));
    for (char& c : ending) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    return ending == "html" || ending == "htm";
}

std::string explain_page(std::string_view data) {
    std::string page =
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; base-uri 'none'; "
        "form-action 'none'; script-src ";
    page.append(csp_hash(kScript)).append("; style-src ").append(csp_hash(kStyle)).append("\">\n");
    page +=
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
        "<meta name=\"color-scheme\" content=\"light dark\">\n<title>refrag: how an answer came "
        "about</title>\n";
    page.append("<style>").append(kStyle).append("</style>\n</head>\n").append(kBody);
    page.append("<script type=\"application/json\" id=\"data\">").append(for_script(data));
    page.append("</script>\n<script>").append(kScript).append("</script>\n</body>\n</html>\n");
    return page;
}

}  // namespace refrag
