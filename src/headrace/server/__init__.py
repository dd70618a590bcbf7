"""The server: OpenAI's, Anthropic's and Ollama's APIs and a web page over bundles, with continuous batching.

    HTTP body ─► a dialect (OpenAI, Anthropic, Ollama) ─► GenerationRequest ─► worker ─► pieces ─► the dialect

A dialect translates and knows no model; the worker's thread owns the engine and knows no dialect.
"""
