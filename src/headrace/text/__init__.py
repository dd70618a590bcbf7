"""Text and token ids: vocabularies, turn formats, chat templates, incremental decoding."""
