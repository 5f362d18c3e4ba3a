// A PostgreSQL server for tests: a database directory made by initdb, a Unix socket in it, no network.
#pragma once

#include <memory>

#include "server_process.h"

#ifdef REFRAG_WITH_POSTGRES
#include "store/postgres.h"
#endif

namespace refrag_test {

#ifdef REFRAG_WITH_POSTGRES

class PostgresServer {
  public:
    // One for all tests of this process.
    // Null where there is no server to start; says SKIP then.
    static PostgresServer* shared() {
        static const std::string initdb = find_program("initdb", program_dirs());
        static const std::string postgres = find_program("postgres", program_dirs());
        static const struct passwd* const user = server_user();
        if ((initdb.empty() || postgres.empty()) &&
            skip("no PostgreSQL server (initdb, postgres) found here"))
            return nullptr;
        if (geteuid() == 0 && user == nullptr &&
            skip("initdb does not run as root, and no other user is known"))
            return nullptr;
        static PostgresServer server(initdb, postgres, user);
        return &server;
    }
    ~PostgresServer() { process_.kill_with(SIGQUIT); }

    void start() {
        process_.start({postgres_, "-D", data_, "-k", dir_.path(), "-F", "-c", "listen_addresses=", "-c",
                        "max_connections=60", "-c", "unix_socket_permissions=0777"},
                       dir_.file("log"), user_);
        const bool ready = becomes_true([this] {
            try {
                refrag::PostgresConnection(refrag::parse_postgres_place(url())).connect();
                return true;
            } catch (const refrag::Error&) {
                return false;
            }
        });
        if (!ready)
            refrag::fail(refrag::Status::runtime, "postgres: ", refrag::read_file(dir_.file("log"), 1 << 20));
    }
    // As when its machine goes down.
    void crash() { process_.kill_with(SIGQUIT); }
    void signal(int number) const { process_.signal(number); }

    std::string url(const std::string& schema = "refrag", const std::string& user = "postgres",
                    const std::string& database = "postgres") const {
        return "postgresql://" + user + "@/" + database + "?host=" + dir_.path() + "#" + schema;
    }
    std::string new_schema() { return refrag::str("s", ++n_schemas_); }
    // Directly, as the owner of everything.
    refrag::PostgresResult sql(const std::string& text) const {
        refrag::PostgresConnection connection(refrag::parse_postgres_place(url()));
        connection.connect();
        return connection.run(text);
    }
    const std::string& dir() const { return dir_.path(); }

  private:
    static const struct passwd* server_user() {
        if (geteuid() != 0) return nullptr;
        const struct passwd* user = getpwnam("postgres");
        return user != nullptr ? user : getpwnam("nobody");
    }
    static std::vector<std::string> program_dirs() {
        std::vector<std::string> dirs;
        std::error_code none;
        for (const auto& entry : std::filesystem::directory_iterator("/usr/lib/postgresql", none))
            dirs.push_back(entry.path() / "bin");
        return dirs;
    }
    PostgresServer(const std::string& initdb, std::string postgres, const struct passwd* user)
        : postgres_(std::move(postgres)), user_(user), data_(dir_.file("data")) {
        if (user != nullptr && chown(dir_.path().c_str(), user->pw_uid, user->pw_gid) != 0)
            refrag::fail(refrag::Status::runtime, "cannot give away ", dir_.path());
        process_.start(
            {initdb, "-N", "-A", "trust", "-U", "postgres", "--locale=C", "-E", "UTF8", "-D", data_},
            dir_.file("log"), user);
        if (process_.wait() != 0)
            refrag::fail(refrag::Status::runtime, "initdb: ", refrag::read_file(dir_.file("log"), 1 << 20));
        // A user with a password, for the tests of that.
        dir_.write("data/pg_hba.conf", "local all guarded scram-sha-256\nlocal all all trust\n");
        start();
    }

    const std::string postgres_;
    const struct passwd* user_;
    const TempDir dir_;
    const std::string data_;
    ServerProcess process_;
    int n_schemas_ = 0;
};

#endif

}  // namespace refrag_test
