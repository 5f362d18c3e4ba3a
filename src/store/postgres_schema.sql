-- A passage store in PostgreSQL, format 1: what `refrag index postgresql://...` makes in a schema of its own.
--
-- Texts, titles, ids and metadata are bytes (bytea), kept as they came: any file name, any text, a zero byte too.
-- To read them: convert_from(text, 'UTF8'). Write through refrag alone: it keeps digests, words and counters.

-- One row. A store of a newer format is refused.
CREATE TABLE format (format integer NOT NULL);
INSERT INTO format VALUES (1);

-- Who encoded what is stored: one row, none of an empty store.
CREATE TABLE stamp (
    only_row  boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    model     bytea   NOT NULL,  -- as the user named it
    maker     bytea   NOT NULL,  -- the model's digest, 32 bytes
    chunk_len integer NOT NULL,  -- k
    form      text    NOT NULL,  -- f32, bf16 or int8
    d_enc     integer NOT NULL,  -- values of an embedding; 0: none are stored
    n_vocab   bigint  NOT NULL
);

CREATE TABLE documents (
    n          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         bytea   NOT NULL,
    source     bytea   NOT NULL,  -- the file that it came from
    title      bytea   NOT NULL,
    metadata   bytea   NOT NULL,  -- a JSON object, as it came
    fields     jsonb   NOT NULL,  -- the same, for --where
    hash       bytea   NOT NULL,  -- of its text and all that its passages depend on
    n_passages bigint  NOT NULL,
    digest     bytea   NOT NULL   -- SHA-256 of the columns above but fields
);
-- By its digest, because an id may be longer than an index entry.
CREATE UNIQUE INDEX documents_id ON documents (sha256(id));

CREATE SEQUENCE passage_numbers;
CREATE TABLE passages (
    n        bigint PRIMARY KEY,
    document bigint   NOT NULL REFERENCES documents ON DELETE CASCADE,
    place    bigint   NOT NULL,  -- among the document's passages, from 0
    first    bigint   NOT NULL,  -- byte span in the document's text
    last     bigint   NOT NULL,
    title    bytea    NOT NULL,
    text     bytea    NOT NULL,
    digest   bytea    NOT NULL,  -- SHA-256 of document id, place, span, title, text and record
    record   bytea    NOT NULL,  -- chunks and their embeddings (src/refrag/passage_record.h)
    n_words  bigint   NOT NULL,  -- of title and text
    words    tsvector NOT NULL,  -- their stems: the title's with weight A, the text's with D
    UNIQUE (document, place)
);
ALTER SEQUENCE passage_numbers OWNED BY passages.n;
-- Embeddings do not get smaller by compression.
ALTER TABLE passages ALTER COLUMN record SET STORAGE EXTERNAL;
CREATE INDEX passages_words ON passages USING gin (words);

-- Apart from the passages, so that a scan of all reads nothing else.
CREATE TABLE vectors (
    n      bigint PRIMARY KEY REFERENCES passages ON DELETE CASCADE,
    vector bytea NOT NULL  -- bf16 values, little end first, and the first 8 bytes of their SHA-256
);
ALTER TABLE vectors ALTER COLUMN vector SET STORAGE EXTERNAL;

-- Sums over the slots: how often the store was changed, its passages, and their words. A transaction adds to one
-- slot as its last step, so that many writers seldom wait for each other.
CREATE TABLE counters (
    slot     integer PRIMARY KEY,
    version  bigint NOT NULL DEFAULT 0,
    passages bigint NOT NULL DEFAULT 0,
    words    bigint NOT NULL DEFAULT 0
);
INSERT INTO counters (slot) SELECT generate_series(0, 31);

-- Stems as the SQLite store's: Porter's, without a list of words to leave out.
CREATE TEXT SEARCH DICTIONARY words (TEMPLATE = snowball, LANGUAGE = porter);
