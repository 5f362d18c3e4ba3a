// What a store in PostgreSQL is made of: postgres_schema.sql, which the Makefile compiles in.
#pragma once

namespace refrag {

extern const char* const postgres_schema_sql;

}  // namespace refrag
