// The API's description, openapi.json, compiled in.
#pragma once

namespace refrag {

extern const char* const openapi_json;

}  // namespace refrag
