// See model.h.
#include "refrag/model.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "io/file.h"
#include "models/lora_weights.h"
#include "refrag/decoder_files.h"
#include "refrag/remote_decoder.h"

namespace refrag {
namespace {

DecoderFiles open_decoder(const std::string& model) {
    DecoderFiles::check_model(model);
    return DecoderFiles(model);
}

void check_vocabulary(const std::string& dir, const Tokenizer& tokenizer, int32_t vocab_size) {
    REFRAG_CHECK(tokenizer.vocab_size() <= vocab_size, Status::bad_input, printable(dir),
                 ": tokenizer.json has ids up to ", tokenizer.vocab_size() - 1, ", expected at most ",
                 vocab_size - 1, " (config.json's vocab_size - 1)");
}

// A shared vocabulary is the same file twice: tokenizer.json, or vocab.json and merges.txt.
void check_same_tokenizer(const std::string& encoder_dir, const std::string& decoder_dir) {
    constexpr uint64_t kMaxTokenizerBytes = 256u << 20;
    const bool json = is_file(path_join(decoder_dir, "tokenizer.json"));
    for (const char* name : {"tokenizer.json", "vocab.json", "merges.txt"}) {
        if (json != (std::string_view(name) == "tokenizer.json")) continue;
        const std::string path = path_join(encoder_dir, name);
        REFRAG_CHECK(
            read_file(path, kMaxTokenizerBytes) ==
                read_file(path_join(decoder_dir, name), kMaxTokenizerBytes),
            Status::bad_input, printable(path),
            ": expected the same file as the decoder's (refrag.json says \"vocabulary\": \"shared\")");
    }
}

// What says how a text becomes ids, of a tokenizer that lies in no file.
void add_pieces(Sha256& hash, const Tokenizer& tokenizer) {
    for (int64_t id = 0; id < tokenizer.vocab_size(); ++id)
        hash.add_field(tokenizer.piece(static_cast<int32_t>(id)));
}

// How the encoder's output becomes a chunk embedding.
void add_reading(Sha256& hash, const Roberta& encoder, const RefragConfig& config) {
    hash.add(encoder.weights_digest().view());
    hash.add_field(str("refrag passage 1; pooling ", static_cast<int>(config.pooling), "; normalize ",
                       config.normalize, "; shared ", config.shared_vocabulary, "; special tokens ",
                       config.encoder_special_tokens));
}

// Adds up what the networks read, against the sizes of the directory's weight files. Those may hold tensors
// that no network reads, so that the end is announced by finish().
class LoadCounter {
  public:
    LoadCounter(const DecoderFiles& decoder, const std::string& dir, bool has_encoder,
                const LoadProgress& progress)
        : progress_(progress) {
        if (!progress_) return;
        total_ = decoder.weight_file_bytes();
        if (!has_encoder) return;
        for (const char* part : {"encoder", "."}) {
            std::error_code ignored;  // a missing directory is refused by who reads it
            for (const auto& entry : std::filesystem::directory_iterator(path_join(dir, part), ignored)) {
                if (entry.path().extension() != ".safetensors") continue;
                const uintmax_t bytes = entry.file_size(ignored);
                if (!ignored) total_ += bytes;
            }
        }
    }
    // Empty where nobody listens.
    LoadedBytes sink() {
        if (!progress_) return {};
        return [this](uint64_t bytes) {
            done_ += bytes;
            progress_(std::min(done_, total_), total_);
        };
    }
    void finish() const {
        if (progress_) progress_(total_, total_);
    }

  private:
    const LoadProgress& progress_;
    uint64_t done_ = 0;
    uint64_t total_ = 0;
};

}  // namespace

Model::Model(Device& device, const std::string& dir, const LoadProgress& progress, WeightFormat format,
             const ChatOptions& chat, const std::vector<std::string>& adapters,
             std::shared_ptr<const RemoteDecoder> remote)
    : Model(device, dir, open_decoder(dir), progress, format, chat, adapters, std::move(remote)) {}

Model::Model(Device& device, const std::string& dir, const DecoderFiles& files, const LoadProgress& progress,
             WeightFormat format, const ChatOptions& chat, const std::vector<std::string>& adapters,
             std::shared_ptr<const RemoteDecoder> remote)
    : device_(device),
      dir_(dir),
      config_(files.is_plain() ? plain_decoder_config() : load_refrag_config(dir)),
      tokenizer_(files.tokenizer()),
      remote_(std::move(remote)),
      gguf_types_(files.gguf_types()) {
    REFRAG_CHECK(!remote_ || adapters.empty(), Status::usage, printable(adapters[0]),
                 ": an adapter of the decoder, which is ", remote_->name(),
                 ": expected it to be merged there");
    LoadCounter counter(files, dir, config_.has_encoder, progress);
    const LoadedBytes loaded = counter.sink();
    const DecoderConfig decoder = files.config(tokenizer_);
    std::unique_ptr<StoredWeights> weights = files.weights(device, decoder, loaded, format);
    const auto adapt = [&](const std::string& adapter_dir) {
        LoraAdapter adapter(adapter_dir);
        adapters_.push_back({adapter_dir, adapter.rank(), adapter.alpha(), adapter.n_matrices()});
        weights = std::make_unique<LoraWeights>(device, std::move(weights), std::move(adapter), format);
    };
    if (!files.adapter_dir().empty() && !remote_) adapt(files.adapter_dir());
    for (const std::string& adapter_dir : adapters) adapt(adapter_dir);
    decoder_ = std::make_unique<Llama>(device, decoder, *weights, remote_ != nullptr);
    choose_chat(files, chat);
    end_ids_ = decoder_->config().eos_ids;
    const std::optional<int32_t> turn_end = end_of_turn(chat_.format, tokenizer_);
    if (turn_end && !is_end(*turn_end)) end_ids_.push_back(*turn_end);
    REFRAG_CHECK(!end_ids_.empty(), Status::bad_input, printable(files.path()), ": ",
                 files.end_token_places());
    if (!config_.has_encoder) {
        // Nothing is encoded; its passages' names still say which tokenizer cut them.
        Sha256 maker;
        maker.add_field("refrag passage 1; no encoder");
        files.add_text_identity(maker);
        maker_ = maker.digest();
    } else {
        load_encoder(files, loaded, format);
    }
    counter.finish();
    bos_id_ = files.bos_id(tokenizer_, decoder_->config());
}

void Model::load_encoder(const DecoderFiles& files, const LoadedBytes& loaded, WeightFormat format) {
    const std::string encoder_dir = path_join(dir_, "encoder");
    encoder_ =
        std::make_unique<Roberta>(device_, encoder_dir, config_.pooling, config_.normalize, loaded, format);
    if (config_.shared_vocabulary) {
        check_same_tokenizer(encoder_dir, files.path());
        REFRAG_CHECK(encoder_->config().vocab_size >= tokenizer_.vocab_size(), Status::bad_input,
                     printable(encoder_dir), ": config.json: expected a vocab_size of at least ",
                     tokenizer_.vocab_size(), " (the shared tokenizer's), found ",
                     encoder_->config().vocab_size);
    } else {
        encoder_tokenizer_ = Tokenizer::from_file(encoder_dir);
        check_vocabulary(encoder_dir, *encoder_tokenizer_, encoder_->config().vocab_size);
    }
    read_encoder_specials(encoder_dir);
    projector_ = std::make_unique<Projector>(device_, dir_, d_enc(), decoder_->config().dim, loaded);
    policy_ = std::make_unique<Policy>(device_, dir_, config_.policy, d_enc(), loaded);
    Sha256 maker;
    add_reading(maker, *encoder_, config_);
    add_text_files(maker, encoder_dir);
    files.add_text_identity(maker);
    maker_ = maker.digest();
    // Known before the first chunk is cut only for a shared vocabulary; with its own, each chunk is checked.
    const int64_t longest =
        static_cast<int64_t>(config_.chunk_len) + (config_.encoder_special_tokens ? 2 : 0);
    REFRAG_CHECK(!config_.shared_vocabulary || longest <= encoder_->config().max_seq_len(), Status::bad_input,
                 printable(path_join(dir_, "refrag.json")), ": chunk_len ", config_.chunk_len, " needs ",
                 longest, " encoder positions, the encoder has ", encoder_->config().max_seq_len());
}

void Model::read_encoder_specials(const std::string& encoder_dir) {
    encoder_bos_ = encoder_->config().bos_id;
    encoder_eos_ = encoder_->config().eos_id;
    if (!encoder_->config().is_bert) return;
    REFRAG_CHECK(encoder_tokenizer_, Status::bad_input, printable(path_join(dir_, "refrag.json")),
                 ": \"vocabulary\": expected \"own\", as a BERT has one, found \"shared\"");
    const auto special = [&](const char* piece) {
        const std::optional<int32_t> id = encoder_tokenizer_->id_of(piece);
        REFRAG_CHECK(id, Status::bad_input, printable(encoder_dir), ": tokenizer.json: expected a token ",
                     piece, ", found none");
        return *id;
    };
    encoder_bos_ = special("[CLS]");
    encoder_eos_ = special("[SEP]");
}

void Model::choose_chat(const DecoderFiles& files, const ChatOptions& chat) {
    // A model directory's template is refrag.json's: the decoder's own is not even read, unless asked for.
    if (chat.format || files.is_plain()) {
        const std::optional<std::string> jinja = files.chat_template();
        const std::optional<ChatTemplate> found = jinja ? recognize_chat_template(*jinja) : std::nullopt;
        if (found && found->format == chat.format.value_or(found->format)) chat_ = *found;
        chat_.format = chat.format.value_or(chat_.format);
        chat_source_ = chat.format ? ChatSource::given
                       : found     ? ChatSource::recognized
                       : jinja     ? ChatSource::unknown
                                   : ChatSource::none;
    }
    if (chat.system) chat_.system = *chat.system;
}

Model::Model(Device& device, ModelParts parts, WeightSource& weights)
    : device_(device),
      config_(std::move(parts.config)),
      tokenizer_(std::move(parts.tokenizer)),
      encoder_tokenizer_(std::move(parts.encoder_tokenizer)),
      decoder_(std::make_unique<Llama>(device, std::move(parts.decoder), weights)),
      encoder_(std::make_unique<Roberta>(parts.encoder, config_.pooling, config_.normalize, weights)),
      projector_(std::make_unique<Projector>(d_enc(), decoder_->config().dim, weights)),
      policy_(std::make_unique<Policy>(config_.policy, d_enc(), weights)),
      bos_id_(parts.bos_id),
      end_ids_(decoder_->config().eos_ids) {
    encoder_bos_ = encoder_->config().bos_id;
    encoder_eos_ = encoder_->config().eos_id;
    Sha256 maker;
    add_reading(maker, *encoder_, config_);
    const RobertaConfig& c = encoder_->config();
    maker.add_field(str(c.n_heads, " ", c.norm_eps, " ", c.bos_id, " ", c.pad_id, " ", c.eos_id));
    add_pieces(maker, tokenizer_);
    if (encoder_tokenizer_) add_pieces(maker, *encoder_tokenizer_);
    maker_ = maker.digest();
}

Sha256Digest Model::passage_maker(int32_t chunk_len, EmbeddingForm form) const {
    return Sha256()
        .add(maker_.view())
        .add_field(str("k ", chunk_len, "; ", embedding_form_name(form)))
        .digest();
}

void Model::require_encoder() const {
    REFRAG_CHECK(
        has_encoder(), Status::usage, printable(dir_),
        ": a plain decoder, without encoder, projector and policy network: expected "
        "--unexpanded drop with --policy bm25, recent, random, perplexity-asc or perplexity-desc; or "
        "--policy all");
}

int64_t Model::window() const {
    const int64_t window = decoder_->config().max_seq_len;
    return remote_ ? std::min(window, remote_->max_context()) : window;
}

int32_t Model::first_id() const {
    return bos_id_ ? *bos_id_ : end_id();
}

int32_t Model::end_id() const {
    return end_ids_[0];
}

bool Model::is_end(int32_t id) const {
    return std::find(end_ids_.begin(), end_ids_.end(), id) != end_ids_.end();
}

EncoderVocabulary Model::encoder_vocabulary() const {
    if (!has_encoder()) return {nullptr, false, 0, 0};
    return {encoder_tokenizer_ ? &*encoder_tokenizer_ : nullptr, config_.encoder_special_tokens, encoder_bos_,
            encoder_eos_};
}

uint64_t Model::parameters() const {
    const uint64_t heads =
        has_encoder() ? encoder_->parameters() + projector_->parameters() + policy_->parameters() : 0;
    return heads + decoder_->parameters();
}

uint64_t Model::weight_bytes() const {
    const uint64_t heads =
        has_encoder() ? encoder_->weight_bytes() + projector_->weight_bytes() + policy_->weight_bytes() : 0;
    return heads + decoder_->weight_bytes();
}

}  // namespace refrag
