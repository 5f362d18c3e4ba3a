# refrag: build, demo, test. `make help` lists the targets.
#
#   make                      build/refrag (the CUDA backend too when nvcc is found; CUDA=0 leaves it out)
#   make demo                 installs what is missing (apt), builds, fetches the default model, answers questions
#   make model                build/refrag-smol: the default model's directory, its base fetched once (93 MB)
#   make test                 installs what is missing (apt), builds and runs every test
#   make SAN=address test     the same under a sanitizer: address, undefined or thread
#   make install              binary, libraries, refrag.h, manual page, completion below PREFIX (/usr/local), in DESTDIR
#   make shared               build/librefrag.so alone
#   make format               clang-format over all sources
#   make tidy                 clang-tidy over src/
#   make fuzz-run SECONDS=60  builds the fuzz targets with clang and runs each from its corpus (make fuzz: builds only)
#   make bench                build/bench_ops, bench_tokenizer, bench_cuda: single ops, tokenizers (`refrag bench`: whole models)
#   make gpu-check PART=quick checks and measures on a GPU: PART quick, tests, sanitize, bench or attention; results in
#                             OUT. PART=carry packs what quick takes along to a machine without compiler or headers
#
# CONFIG=debug keeps REFRAG_DCHECK and -O1; CONFIG=release (default) is -O2 -DNDEBUG. WERROR=0: warnings are no errors.
# STATIC=1: only the C library is not linked in; without store, server and line editing, whose libraries are shared ones.

.DEFAULT_GOAL := all
CXX      ?= g++
CONFIG   ?= release
SAN      ?=
CUDA     ?= auto
V        ?= 0
WERROR   ?= 1
STATIC   ?= 0
ifeq ($(STATIC),1)
STORE := 0
EDIT  := 0
SERVE := 0
REMOTE := 0
endif

BUILD := build
ifneq ($(CONFIG),release)
BUILD := $(BUILD)/$(CONFIG)
endif
ifneq ($(SAN),)
BUILD := $(BUILD)/san-$(SAN)
endif

WARN := -Wall -Wextra -Wpedantic -Wshadow -Wconversion $(if $(filter 0,$(WERROR)),,-Werror)
ifeq ($(SAN),)
OPT_release := -O2 -DNDEBUG
OPT_debug   := -O1 -g
else ifneq ($(filter $(SAN),address undefined thread),)
# Sanitizer builds keep the invariants on.
OPT_release := -O1 -g -fno-omit-frame-pointer -fsanitize=$(SAN) -fno-sanitize-recover=all
OPT_debug   := $(OPT_release)
SAN_LDFLAGS := -fsanitize=$(SAN)
else
$(error SAN=$(SAN): expected address, undefined or thread)
endif
ifeq ($(OPT_$(CONFIG)),)
$(error CONFIG=$(CONFIG): expected release or debug)
endif

comma    := ,
space    := $(subst ,, )
VERSION  := $(shell cat VERSION)
# Objects serve both libraries. Hidden: what a shared library does not export can be inlined and called directly.
CXXFLAGS += -std=c++20 $(OPT_$(CONFIG)) $(WARN) -pthread -fPIC -fvisibility=hidden
CPPFLAGS += -Isrc -I. -MMD -MP -DREFRAG_VERSION='"$(VERSION)"'
LDFLAGS  += -pthread $(SAN_LDFLAGS)
LDLIBS   += $(if $(filter 1,$(STATIC)),-static-libstdc++ -static-libgcc -l:libutf8proc.a,-lutf8proc)

# ---- the store: SQLite, found by itself, said aloud, never needed (STORE=0 leaves it out) ------------------
STORE ?= auto
HAS_SQLITE := $(wildcard /usr/include/sqlite3.h /usr/local/include/sqlite3.h)
ifeq ($(STORE),0)
STORE_SAYS := left out (STORE=0)
else ifeq ($(HAS_SQLITE),)
STORE_SAYS := no sqlite3.h found (libsqlite3-dev), building without passage store and cache
else
STORE_SAYS := SQLite
WITH_STORE := yes
CPPFLAGS   += -DREFRAG_WITH_STORE
LDLIBS     += -lsqlite3
endif

# ---- beside the store: PostgreSQL (libpq) and a shared cache in Redis or Valkey (hiredis): found, said, never needed
POSTGRES ?= auto
LIBPQ_H  := $(firstword $(wildcard $(shell pkg-config --variable=includedir libpq 2>/dev/null)/libpq-fe.h \
              /usr/include/postgresql/libpq-fe.h /usr/include/libpq-fe.h /usr/local/include/libpq-fe.h))
ifeq ($(WITH_STORE),)
POSTGRES_SAYS := left out with the store
else ifeq ($(POSTGRES),0)
POSTGRES_SAYS := left out (POSTGRES=0)
else ifeq ($(LIBPQ_H),)
POSTGRES_SAYS := no libpq-fe.h found (libpq-dev), building without stores on PostgreSQL
else
POSTGRES_SAYS := libpq
WITH_POSTGRES := yes
SERVER_FLAGS  += -DREFRAG_WITH_POSTGRES -isystem $(dir $(LIBPQ_H))
LDLIBS        += -lpq
# The tables' text, compiled in.
POSTGRES_SQL  := $(BUILD)/obj/src/store/postgres_schema.o
endif

VALKEY    ?= auto
HIREDIS_H := $(firstword $(wildcard $(addsuffix /hiredis/hiredis.h,/usr/include /usr/local/include)))
ifeq ($(WITH_STORE),)
VALKEY_SAYS := left out with the store
else ifeq ($(VALKEY),0)
VALKEY_SAYS := left out (VALKEY=0)
else ifeq ($(HIREDIS_H),)
VALKEY_SAYS := no hiredis/hiredis.h found (libhiredis-dev), building without caches in Redis or Valkey
else
VALKEY_SAYS := hiredis
WITH_VALKEY := yes
SERVER_FLAGS += -DREFRAG_WITH_VALKEY
LDLIBS       += -lhiredis
endif

# ---- the server: libmicrohttpd, found by itself, said aloud, never needed (SERVE=0 leaves it out) -----------
SERVE       ?= auto
HAS_MICROHTTPD := $(wildcard /usr/include/microhttpd.h /usr/local/include/microhttpd.h)
ifeq ($(SERVE),0)
SERVE_SAYS := left out (SERVE=0)
else ifeq ($(HAS_MICROHTTPD),)
SERVE_SAYS := no microhttpd.h found (libmicrohttpd-dev), building without server
else
SERVE_SAYS := libmicrohttpd
WITH_SERVE := yes
LDLIBS     += -lmicrohttpd
# The API's description, compiled in.
OPENAPI    := $(BUILD)/obj/src/server/openapi.o
endif

# ---- decoders elsewhere (--decoder-url): libcurl, found by itself, said aloud, never needed (REMOTE=0 leaves it out)
REMOTE   ?= auto
HAS_CURL := $(wildcard $(addsuffix /curl/curl.h,/usr/include /usr/include/$(shell $(CXX) -dumpmachine 2>/dev/null) /usr/local/include))
ifeq ($(REMOTE),0)
REMOTE_SAYS := left out (REMOTE=0)
else ifeq ($(HAS_CURL),)
REMOTE_SAYS := no curl/curl.h found (libcurl4-openssl-dev), building without decoders elsewhere
else
REMOTE_SAYS := libcurl
WITH_REMOTE := yes
LDLIBS      += -lcurl
endif

# ---- line editing in `chat`: libedit, found by itself, never needed (EDIT=0 leaves it out) ------------------
EDIT ?= auto
ifneq ($(and $(filter-out 0,$(EDIT)),$(wildcard /usr/include/editline/readline.h)),)
WITH_EDIT := yes
CPPFLAGS  += -DREFRAG_WITH_LIBEDIT
LDLIBS    += -ledit
endif

LIB_SRC  := $(filter-out src/cli/% $(if $(WITH_SERVE),,src/server/%) $(if $(WITH_REMOTE),,src/remote/%) $(if $(WITH_STORE),,src/store/%) $(if $(WITH_POSTGRES),,src/store/postgres%) \
              $(if $(WITH_VALKEY),,src/store/redis%),$(wildcard src/*/*.cpp))
CLI_SRC  := $(filter-out $(if $(WITH_STORE),src/cli/without_store.cpp,src/cli/store_%) $(if $(WITH_SERVE),src/cli/without_serve.cpp,src/cli/serve.cpp) \
              $(if $(WITH_REMOTE),src/cli/without_remote.cpp,src/cli/remote_decoder.cpp), \
              $(wildcard src/cli/*.cpp))
TEST_SRC := $(filter-out $(if $(WITH_SERVE),,tests/test_serve%) $(if $(WITH_REMOTE),,tests/test_remote% tests/test_serve_remote%) $(if $(WITH_STORE),,tests/test_store%) $(if $(WITH_POSTGRES),,tests/test_store_postgres%) \
              $(if $(WITH_VALKEY),,tests/test_store_redis%),$(wildcard tests/*.cpp tests/fuzz/*.cpp))
LIB_OBJ  := $(LIB_SRC:%.cpp=$(BUILD)/obj/%.o) $(POSTGRES_SQL) $(OPENAPI)
CLI_OBJ  := $(CLI_SRC:%.cpp=$(BUILD)/obj/%.o)
TEST_OBJ := $(TEST_SRC:%.cpp=$(BUILD)/obj/%.o)
# bench_cuda's tables; the tests run them over the kernels that run on the CPU.
BENCH_CUDA_OBJ := $(patsubst %.cpp,$(BUILD)/obj/%.o,$(wildcard bench/bench_cuda_*.cpp))
# The tests drive the commands in-process, so they link all of the command line but its main().
CLI_LIB_OBJ := $(filter-out %/main.o,$(CLI_OBJ))

# The kernels as C++ for the tests, with tests/cuda_on_host/ in place of CUDA. cuBLAS has a stand-in there, and
# there is no speed to measure.
ON_HOST_SRC   := $(filter-out cuda/cublas.cu cuda/peaks.cu,$(wildcard cuda/*.cu)) $(wildcard tests/cuda_on_host/*.cpp)
ON_HOST_OBJ   := $(ON_HOST_SRC:%=$(BUILD)/obj/on_host/%.o)
ON_HOST_FLAGS := -DREFRAG_CUDA_ON_HOST -Itests/cuda_on_host -Icuda -fno-strict-aliasing \
                 -include tests/cuda_on_host/on_host.h -x c++

# ---- CUDA: found by itself, said aloud, never needed --------------------------------------------------
# CUDA_ARCHS: compute capabilities to compile for. PTX of CUDA_PTX runs on what comes later; empty: none is made.
NVCC       ?= $(shell command -v nvcc 2>/dev/null)
CUDA_ARCHS ?= 80 90a
CUDA_PTX   ?= 90
CUDA_SRC   := $(wildcard cuda/*.cu)
ifeq ($(CUDA),0)
CUDA_SAYS := left out (CUDA=0)
else ifeq ($(NVCC),)
CUDA_SAYS := no nvcc found, building for the CPU alone
else ifneq ($(SAN),)
CUDA_SAYS := left out of sanitizer builds (the kernels are tested on the host there)
else
CUDA_SAYS := $(NVCC), for sm_$(subst $(space),$(comma) sm_,$(CUDA_ARCHS))$(if $(CUDA_PTX), and compute_$(CUDA_PTX))
CUDA_OBJ  := $(CUDA_SRC:%.cu=$(BUILD)/obj/%.o)
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
NVCCFLAGS += -std=c++20 -O3 --expt-relaxed-constexpr $(if $(filter debug,$(CONFIG)),-lineinfo,-DNDEBUG) $(if $(filter 0,$(WERROR)),,-Werror all-warnings) \
             -Xcompiler -Wall,-Wextra,-pthread,-fPIC $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
             $(if $(CUDA_PTX),-gencode arch=compute_$(CUDA_PTX)$(comma)code=compute_$(CUDA_PTX))
CPPFLAGS  += -DREFRAG_WITH_CUDA
# The runtime library comes along; cuBLAS and the driver are found when a device is opened.
LDLIBS    += $(firstword $(wildcard $(CUDA_HOME)/lib64/libcudart_static.a \
               $(CUDA_HOME)/targets/x86_64-linux/lib/libcudart_static.a) -lcudart_static) -ldl -lrt
endif

# SERVED_OBJ: what knows of servers.
# Changes when the CUDA backend, the store or a server's library comes or goes: what is compiled differently then is compiled anew.
WITH_PARTS := $(BUILD)/obj/with-parts
PARTS      := cuda $(if $(CUDA_OBJ),yes,no), store $(if $(WITH_STORE),yes,no), edit $(if $(WITH_EDIT),yes,no), serve $(if $(WITH_SERVE),yes,no), \
              remote $(if $(WITH_REMOTE),yes,no),
SERVED_OBJ := $(filter $(BUILD)/obj/src/store/% $(BUILD)/obj/tests/test_store%,$(LIB_OBJ) $(TEST_OBJ)) \
              $(BUILD)/obj/src/cli/cache_options.o
PARTS      += postgres $(if $(WITH_POSTGRES),yes,no), valkey $(if $(WITH_VALKEY),yes,no)
$(CLI_OBJ) $(TEST_OBJ) $(SERVED_OBJ): $(WITH_PARTS)
# What the tests say SKIP of.
$(BUILD)/obj/tests/test_parts.o: CPPFLAGS += -DREFRAG_LEFT_OUT='"$(strip $(if $(WITH_STORE),,SQLite) $(if $(WITH_POSTGRES),,libpq) \
    $(if $(WITH_VALKEY),,hiredis) $(if $(WITH_SERVE),,libmicrohttpd) $(if $(WITH_REMOTE),,libcurl) $(if $(WITH_EDIT),,libedit))"'
$(SERVED_OBJ): CPPFLAGS += $(SERVER_FLAGS)
$(WITH_PARTS): FORCE
	@mkdir -p $(@D)
	@echo '$(PARTS)' | cmp -s - $@ || echo '$(PARTS)' > $@
FORCE:

ifeq ($(V),0)
Q := @
say = @echo "  $(1)  $(2)"
else
Q :=
say = @:
endif

.PHONY: FORCE all shared demo model test test-files deps deps-demo deps-fuzz deps-tidy install uninstall format format-check tidy clean help bench gpu-check cuda-says fuzz fuzz-run

all: cuda-says $(BUILD)/refrag

cuda-says:
	@echo "  CUDA  $(CUDA_SAYS)"
	@echo "  STORE $(STORE_SAYS)"
	@echo "  POSTGRES $(POSTGRES_SAYS)"
	@echo "  VALKEY $(VALKEY_SAYS)"
	@echo "  SERVE $(SERVE_SAYS)"
	@echo "  REMOTE $(REMOTE_SAYS)"

$(BUILD)/librefrag.a: $(LIB_OBJ) $(CUDA_OBJ)
	$(call say,AR  ,$@)
	$(Q)rm -f $@ && ar rcs $@ $^

# The shared library: the rooms that the C interface needs, and nothing exported but that.
ABI      := $(shell sed -n 's/^.define REFRAG_ABI_VERSION //p' src/refrag.h)
SHARED   := $(BUILD)/librefrag.so.$(VERSION)
SO_ROOMS := base io text ops cpu models refrag api
SO_OBJ   := $(filter $(SO_ROOMS:%=$(BUILD)/obj/src/%/%.o),$(LIB_OBJ)) $(CUDA_OBJ)
SO_LIBS  := $(filter-out -lsqlite3 -ledit -lpq -lhiredis -lmicrohttpd -lcurl,$(LDLIBS))
$(SHARED): $(SO_OBJ) src/api/exports.map
	$(call say,LINK,$@)
	$(Q)$(CXX) -shared $(LDFLAGS) -Wl,-soname,librefrag.so.$(ABI) -Wl,--version-script=src/api/exports.map -Wl,-z,defs \
	   -o $@ $(SO_OBJ) $(SO_LIBS)
	$(Q)ln -sf $(@F) $(BUILD)/librefrag.so.$(ABI) && ln -sf librefrag.so.$(ABI) $(BUILD)/librefrag.so
shared: $(SHARED)

$(BUILD)/refrag: $(CLI_OBJ) $(BUILD)/librefrag.a
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

# These calls go through tests/failing.cpp in the tests, so that each can be made to fail.
TEST_WRAP := aligned_alloc open pread read write fstat stat fsync fchmod close rename realpath
# The library's objects stand first: of an inline function the linker takes the first that it meets, and it is the
# library's, as it is shipped, that is tested. (librefrag.a adds the CUDA backend, where there is one.)
$(BUILD)/refrag-tests: $(LIB_OBJ) $(CLI_LIB_OBJ) $(TEST_OBJ) $(ON_HOST_OBJ) $(BENCH_CUDA_OBJ) $(BUILD)/librefrag.a
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) $(TEST_WRAP:%=-Wl,--wrap=%) -o $@ $^ $(LDLIBS)

$(BUILD)/bench_ops: $(BUILD)/obj/bench/bench_ops.o $(BUILD)/librefrag.a
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/bench_tokenizer: $(BUILD)/obj/bench/bench_tokenizer.o $(BUILD)/librefrag.a
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/bench_cuda: $(BUILD)/obj/bench/bench_cuda.o $(BENCH_CUDA_OBJ) $(BUILD)/librefrag.a
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

bench: $(BUILD)/bench_ops $(BUILD)/bench_tokenizer $(if $(CUDA_OBJ),$(BUILD)/bench_cuda)

# PART: quick, in two calls of 8 and 3.5 minutes, or tests, sanitize, bench or attention, each in less than 9; logs and
# results go to OUT. carry: packs build/carry.tar.gz for quick.
PART ?=
OUT  ?= build/gpu-check
gpu-check:
	@REFRAG_BUILD='$(BUILD)' bash bench/gpu_check.sh '$(PART)' '$(OUT)'

# The tests' own code is compiled in half the time this way; what they test keeps its -O2.
$(TEST_OBJ): CXXFLAGS := $(CXXFLAGS:-O2=-O1)

$(BUILD)/obj/%.o: %.cpp VERSION
	$(call say,CXX ,$<)
	@mkdir -p $(@D)
	$(Q)$(CXX) $(CPPFLAGS) $(CXXFLAGS) -c -o $@ $<

$(POSTGRES_SQL): src/store/postgres_schema.sql
	$(call say,SQL ,$<)
	@mkdir -p $(@D)
	$(Q){ echo 'namespace refrag { extern const char* const postgres_schema_sql; const char* const postgres_schema_sql = R"sql('; \
	   cat $<; echo ')sql"; }'; } | $(CXX) $(CXXFLAGS) -x c++ -c -o $@ -

$(OPENAPI): src/server/openapi.json VERSION
	$(call say,JSON,$<)
	@mkdir -p $(@D)
	$(Q){ echo 'namespace refrag { extern const char* const openapi_json; const char* const openapi_json = R"json('; \
	   sed 's/@VERSION@/$(VERSION)/' $<; echo ')json"; }'; } | $(CXX) $(CXXFLAGS) -x c++ -c -o $@ -

$(BUILD)/obj/%.o: %.cu VERSION
	$(call say,NVCC,$<)
	@mkdir -p $(@D)
	$(Q)$(NVCC) $(NVCCFLAGS) -Isrc -I. -Icuda -MMD -MP -c -o $@ $<

$(BUILD)/obj/on_host/%.o: % VERSION
	$(call say,HOST,$<)
	@mkdir -p $(@D)
	$(Q)$(CXX) $(CPPFLAGS) $(CXXFLAGS) $(ON_HOST_FLAGS) -c -o $@ $<

$(BUILD)/obj/tests/test_cuda_%.o: tests/test_cuda_%.cpp VERSION
	$(call say,HOST,$<)
	@mkdir -p $(@D)
	$(Q)$(CXX) $(CPPFLAGS) $(CXXFLAGS) $(ON_HOST_FLAGS) -c -o $@ $<

-include $(ON_HOST_OBJ:.o=.d) $(CUDA_OBJ:.o=.d) $(LIB_OBJ:.o=.d) $(CLI_OBJ:.o=.d) $(TEST_OBJ:.o=.d) $(wildcard $(BUILD)/obj/bench/*.d)

# ---- set-up ---------------------------------------------------------------------------------------------
# Debian packages, installed only where missing, without questions: for building and testing (and python3, which
# converts published vocabularies where REFRAG_TEST_DATA has some), for fuzzing, for clang-tidy.
PACKAGES_deps      := g++ doctest-dev nlohmann-json3-dev libutf8proc-dev libcli11-dev libsqlite3-dev libedit-dev libmicrohttpd-dev libcurl4-openssl-dev $(if $(REFRAG_TEST_DATA),python3)
PACKAGES_deps-demo := python3 python3-pip
PACKAGES_deps-fuzz := $(PACKAGES_deps) clang libclang-rt-14-dev
PACKAGES_deps-tidy := $(PACKAGES_deps) clang-tidy
deps deps-demo deps-fuzz deps-tidy:
	@missing=""; for p in $(PACKAGES_$@); do \
	   dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	 if [ -n "$$missing" ]; then \
	   echo "  APT   installing:$$missing"; \
	   sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	   $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	     --no-install-recommends $$missing >/dev/null || \
	   { echo "could not install:$$missing (need root or sudo; install them by hand)" >&2; exit 1; }; \
	 fi

JOBS := $(shell nproc 2>/dev/null || echo 2)

# Built by a second make, because on a fresh machine the compiler and the headers come with `deps`.
# Offline, and without pip, the demo falls back to the model in the repository.
demo: deps
	@$(MAKE) --no-print-directory deps-demo || true
	@$(MAKE) --no-print-directory -j$(JOBS) all
	@python3 bench/demo/demo.py --refrag $(BUILD)/refrag

# The default model's directory, build/refrag-smol: its base is fetched once into a cache outside the tree.
model: deps-demo
	@python3 weights_tools/set_up_smol.py

# Real vocabularies for the tests: made once from REFRAG_TEST_DATA, where that and python3 are there.
TOKENIZERS := build/tokenizers
ifneq ($(and $(REFRAG_TEST_DATA),$(wildcard $(REFRAG_TEST_DATA)/tokenizers),$(shell command -v python3 2>/dev/null)),)
TEST_FILES := $(TOKENIZERS)/made
endif
$(TOKENIZERS)/made: weights_tools/convert_tokenizer.py
	$(call say,CONV,$(TOKENIZERS))
	$(Q)python3 $< --all "$(REFRAG_TEST_DATA)/tokenizers" --out $(TOKENIZERS) >/dev/null && touch $@

test-files: $(TEST_FILES)
test: deps
	@$(MAKE) --no-print-directory -j$(JOBS) all shared $(BUILD)/refrag-tests test-files
	@REFRAG_BINARY=$(BUILD)/refrag $(BUILD)/refrag-tests $(TEST_ARGS)

# ---- installation -------------------------------------------------------------------------------------------
# Manual page and completion are the binary's own account of its command line.
PREFIX  ?= /usr/local
DESTDIR ?=
BINDIR  ?= $(PREFIX)/bin
DATADIR ?= $(PREFIX)/share
LIBDIR  ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
INSTALLED = $(BINDIR)/refrag $(INCLUDEDIR)/refrag.h $(LIBDIR)/librefrag.a $(LIBDIR)/librefrag.so.$(VERSION) \
            $(LIBDIR)/librefrag.so.$(ABI) $(LIBDIR)/librefrag.so $(LIBDIR)/pkgconfig/refrag.pc \
            $(LIBDIR)/cmake/refrag/refragConfig.cmake $(LIBDIR)/cmake/refrag/refragConfigVersion.cmake $(DATADIR)/man/man1/refrag.1 $(DATADIR)/bash-completion/completions/refrag \
            $(DATADIR)/zsh/site-functions/_refrag $(DATADIR)/fish/vendor_completions.d/refrag.fish

$(BUILD)/share/refrag.1: $(BUILD)/refrag
	@mkdir -p $(@D)
	$(Q)$< man > $@.part && mv $@.part $@
# What a program that links librefrag.a needs beside it: the store's and the terminal's libraries it does not.
PC_LIBS  = $(strip $(SO_LIBS) -pthread -lstdc++ -lm)
PC_FILES := $(addprefix $(BUILD)/share/,refrag.pc refragConfig.cmake refragConfigVersion.cmake)
$(PC_FILES): $(BUILD)/share/%: src/api/%.in FORCE
	@mkdir -p $(@D)
	$(Q)sed -e 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR)|; s|@INCLUDEDIR@|$(INCLUDEDIR)|; s|@VERSION@|$(VERSION)|; s|@ABI@|$(ABI)|' \
	   -e 's|@PRIVATE@|$(PC_LIBS)|; s|@PRIVATE_LIST@|$(subst $(space),;,$(PC_LIBS))|' $< > $@
$(BUILD)/share/refrag.%: $(BUILD)/refrag
	@mkdir -p $(@D)
	$(Q)$< completion $* > $@.part && mv $@.part $@

install: $(BUILD)/refrag $(SHARED) $(addprefix $(BUILD)/share/refrag.,1 bash zsh fish) $(PC_FILES)
	$(Q)install -D -m 755 $(BUILD)/refrag $(DESTDIR)$(BINDIR)/refrag
	$(Q)install -D -m 644 src/refrag.h $(DESTDIR)$(INCLUDEDIR)/refrag.h
	$(Q)install -D -m 644 $(BUILD)/librefrag.a $(DESTDIR)$(LIBDIR)/librefrag.a
	$(Q)install -D -m 644 $(SHARED) $(DESTDIR)$(LIBDIR)/librefrag.so.$(VERSION)
	$(Q)ln -sf librefrag.so.$(VERSION) $(DESTDIR)$(LIBDIR)/librefrag.so.$(ABI)
	$(Q)ln -sf librefrag.so.$(ABI) $(DESTDIR)$(LIBDIR)/librefrag.so
	$(Q)install -D -m 644 $(BUILD)/share/refrag.pc $(DESTDIR)$(LIBDIR)/pkgconfig/refrag.pc
	$(Q)install -D -m 644 -t $(DESTDIR)$(LIBDIR)/cmake/refrag $(BUILD)/share/refragConfig.cmake $(BUILD)/share/refragConfigVersion.cmake
	$(Q)install -D -m 644 $(BUILD)/share/refrag.1 $(DESTDIR)$(DATADIR)/man/man1/refrag.1
	$(Q)install -D -m 644 $(BUILD)/share/refrag.bash $(DESTDIR)$(DATADIR)/bash-completion/completions/refrag
	$(Q)install -D -m 644 $(BUILD)/share/refrag.zsh $(DESTDIR)$(DATADIR)/zsh/site-functions/_refrag
	$(Q)install -D -m 644 $(BUILD)/share/refrag.fish $(DESTDIR)$(DATADIR)/fish/vendor_completions.d/refrag.fish
	@printf '  INSTALL  %s\n' $(addprefix $(DESTDIR),$(INSTALLED))
uninstall:
	rm -f $(addprefix $(DESTDIR),$(INSTALLED))
	$(Q)rmdir $(DESTDIR)$(LIBDIR)/cmake/refrag 2>/dev/null || true

# ---- fuzzing: clang's libFuzzer with address and undefined-behaviour sanitizers, objects of its own -----------
# The corpus is copied into build/, so that a run changes nothing in the tree.
FUZZ_CXX     ?= clang++
FUZZ_TARGETS ?= safetensors gguf config tokenizer vocabulary passages requests
SECONDS      ?= 60
FUZZ         := build/fuzz
FUZZ_FLAGS   := -std=c++20 -O1 -g -fno-omit-frame-pointer $(WARN) -pthread -DREFRAG_LIBFUZZER
FUZZ_SAN     := address,undefined -fno-sanitize-recover=all
FUZZ_SRC     := $(wildcard src/base/*.cpp src/io/*.cpp src/text/*.cpp src/models/*_config.cpp) \
                src/refrag/passages.cpp src/refrag/requests.cpp src/eval/qa_data.cpp tests/fuzz/targets.cpp
FUZZ_OBJ     := $(FUZZ_SRC:%.cpp=$(FUZZ)/obj/%.o)
FUZZ_BIN     := $(FUZZ_TARGETS:%=$(FUZZ)/fuzz_%)
.SECONDARY: $(FUZZ_TARGETS:%=$(FUZZ)/obj/tests/fuzz/fuzz_%.o)

$(FUZZ)/obj/%.o: %.cpp VERSION
	$(call say,FUZZ,$<)
	@mkdir -p $(@D)
	$(Q)$(FUZZ_CXX) $(CPPFLAGS) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link,$(FUZZ_SAN) -c -o $@ $<

$(FUZZ)/libfuzzed.a: $(FUZZ_OBJ)
	$(call say,AR  ,$@)
	$(Q)rm -f $@ && ar rcs $@ $^

$(FUZZ)/fuzz_%: $(FUZZ)/obj/tests/fuzz/fuzz_%.o $(FUZZ)/libfuzzed.a
	$(call say,LINK,$@)
	$(Q)$(FUZZ_CXX) -pthread -fsanitize=fuzzer,$(FUZZ_SAN) -o $@ $^ -lutf8proc

fuzz: deps-fuzz
	@$(MAKE) --no-print-directory -j$(JOBS) $(FUZZ_BIN)

fuzz-run: fuzz
	@$(MAKE) --no-print-directory -j$(JOBS) $(FUZZ_TARGETS:%=fuzz-run-%)
fuzz-run-%: FORCE
	@mkdir -p $(FUZZ)/found; rm -rf $(FUZZ)/corpus/$*; mkdir -p $(FUZZ)/corpus/$*; \
	cp tests/fuzz/corpus/$*/* $(FUZZ)/corpus/$*/; \
	dict=""; [ ! -f tests/fuzz/$*.dict ] || dict="-dict=tests/fuzz/$*.dict"; \
	if $(FUZZ)/fuzz_$* -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=2048 -max_len=16384 $$dict \
	   -artifact_prefix=$(FUZZ)/found/$*- -print_final_stats=1 $(FUZZ)/corpus/$* >$(FUZZ)/$*.log 2>&1; \
	then echo "  FUZZ  $*: $$(grep '^Done' $(FUZZ)/$*.log), $$(grep -o 'cov: [0-9]* ft: [0-9]*' $(FUZZ)/$*.log | tail -n 1)"; \
	else \
	  grep -E 'ERROR|SUMMARY|runtime error|broken promise|what\(\)' $(FUZZ)/$*.log | head -n 5 >&2; \
	  echo "fuzz $*: a finding: $$(sed -n 's/.*Test unit written to //p' $(FUZZ)/$*.log | tail -n 1) (log: $(FUZZ)/$*.log)" >&2; \
	  exit 1; \
	fi

-include $(wildcard $(FUZZ)/obj/*/*.d $(FUZZ)/obj/*/*/*.d)

# ---- care -------------------------------------------------------------------------------------------------
FORMAT_SRC := $(wildcard src/*.h src/*/*.cpp src/*/*.h tests/*.c tests/*.cpp tests/*.h tests/fuzz/*.cpp tests/fuzz/*.h \
  bench/*.cpp bench/*.h cuda/*.cu cuda/*.cuh cuda/*.h tests/cuda_on_host/*.cpp tests/cuda_on_host/*.h)
format:
	clang-format -i $(FORMAT_SRC)
format-check:
	clang-format --dry-run -Werror $(FORMAT_SRC)

# The checks, and why some are off, are in .clang-tidy. Headers are checked with the sources that include them.
# Two passes, because the checks of the syntax tree spend nearly all their time in the system's headers:
#   tree    every check but the analyzer's. A room's sources go through it as one, so that its headers are walked
#           once; a name local to a file therefore stands once in a room. Sources compiled for several
#           instruction sets repeat names on purpose: those go alone.
#   paths   the analyzer, and the checks that look at the file they are given and at none that it includes. The
#           standard library's functions are not stepped into: that halves the time.
TIDY_SRC   := $(LIB_SRC) $(CLI_SRC)
TIDY_ALONE := $(wildcard src/cpu/simd_*.cpp)
TIDY_ROOMS := $(sort $(patsubst src/%/,%,$(dir $(TIDY_SRC))))
TIDY_PATHS := clang-analyzer-*,misc-unused-using-decls,misc-unused-alias-decls
TIDY_FLAGS  = -std=c++20 $(filter-out -MMD -MP,$(CPPFLAGS)) $(SERVER_FLAGS)
TIDY_TREE   = clang-tidy --quiet --checks='-clang-analyzer-*' --header-filter='^(.*/)?src/.*\.(h|inl|cpp)$$'
tidy: deps-tidy
	@$(MAKE) --no-print-directory -j$(JOBS) $(TIDY_ROOMS:%=$(BUILD)/tidy/%.tree) $(TIDY_ALONE:%=$(BUILD)/tidy/%.tree) \
	   $(TIDY_SRC:%=$(BUILD)/tidy/%.paths)
$(TIDY_ROOMS:%=$(BUILD)/tidy/%.tree): $(BUILD)/tidy/%.tree: $(TIDY_SRC) $(wildcard src/*/*.h src/*/*.inl) .clang-tidy
	$(call say,TIDY,src/$*)
	@mkdir -p $(@D)
	@printf '#include "$(CURDIR)/%s"  // NOLINT(bugprone-suspicious-include)\n' \
	   $(filter-out $(TIDY_ALONE),$(filter src/$*/%,$(TIDY_SRC))) > $(BUILD)/tidy/$*.cpp
	$(Q)$(TIDY_TREE) --config-file=.clang-tidy $(BUILD)/tidy/$*.cpp -- $(TIDY_FLAGS) >$@.log 2>&1 || { cat $@.log >&2; exit 1; }
	@touch $@
$(BUILD)/tidy/%.cpp.tree: %.cpp .clang-tidy
	$(call say,TIDY,$<)
	@mkdir -p $(@D)
	$(Q)$(TIDY_TREE) $< -- $(TIDY_FLAGS) >$@.log 2>&1 || { cat $@.log >&2; exit 1; }
	@touch $@
$(BUILD)/tidy/%.paths: % .clang-tidy
	$(call say,PATH,$<)
	@mkdir -p $(@D)
	$(Q)clang-tidy --quiet --checks='-*,$(TIDY_PATHS)' $< -- $(TIDY_FLAGS) -Xclang -analyzer-config \
	   -Xclang c++-stdlib-inlining=false >$@.log 2>&1 || { cat $@.log >&2; exit 1; }
	@touch $@

clean:
	rm -rf build

help:
	@sed -n '2,18s/^# \{0,1\}//p' Makefile
