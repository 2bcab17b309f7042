"""Data: from text to batches.

tokenizers     bytes (built in) and any `tokenizer.json`; chats; decoding a stream
config         DataConfig and SourceConfig: the sources and how they are packed
sources        TFDS datasets without TensorFlow, local files, in-memory records; stdlib_text is the built-in dataset
documents      records to token ids with a loss mask
packing        documents to sequences of fixed length
pipeline       documents to the sequences of one stream, with Grain
loader         build_loader: the streams' sequences to batches, or to one process's share of them
loader_state   the loader's state: saved from all processes, restored with any number of them
"""
