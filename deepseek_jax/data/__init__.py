"""From text to batches.

tokenizers     bytes (built in) and any `tokenizer.json`; chats; decoding a stream
config         DataConfig and SourceConfig: what is read and how it is packed
sources        TFDS datasets without TensorFlow, local files, in-memory records; stdlib_text is the built-in TFDS dataset
documents      records to token ids with a loss mask
packing        documents to rows of fixed length
loader         build_loader: the Grain pipeline, whose position can be saved
"""
