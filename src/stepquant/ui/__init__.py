"""Browser interface for quantizing a model and comparing images. Only `app` needs Gradio."""
