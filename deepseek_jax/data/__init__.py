"""From text to batches.

tokenizers     bytes (built in) and any `tokenizer.json`; chats; decoding a stream
config         DataConfig and SourceConfig: what is read and how it is packed
sources        TFDS datasets without TensorFlow, local files, in-memory records; stdlib_text is the built-in TFDS dataset
documents      records to token ids with a loss mask
packing        documents to rows of fixed length
pipeline       documents to the rows of one stream, with Grain
loader         build_loader: the streams' rows to batches, or to one process's share of them
loader_state   where a loader is: saved from all processes, restored with any number of them
"""
