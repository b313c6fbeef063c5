"""Our models in the formats of other programs, and their models in ours: one module a format, both directions in it.

| format | module | read by | written by us with | read by us with |
| --- | --- | --- | --- | --- |
| Hugging Face Llama, Qwen3 | `huggingface` | transformers, vLLM, torchtitan | `to_hf` | `from_hf` |
| Hugging Face tokenizer | `hf_tokenizer` | transformers, tokenizers | `write_hf_tokenizer` | `open_tokenizer_json` |
| Hugging Face Hub | `hub` | all of these | `push_to_hub` | `from_hub` |
| GGUF | `gguf` | llama.cpp and programs built on it | `to_gguf` | `from_gguf` |
| llama2.c | `llama2c` | its C program | `to_llama2c` | |
| Meta Llama | `meta` | Meta's own code | | `from_meta` |
"""
