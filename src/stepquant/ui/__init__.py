"""A gallery in the browser: pick a model, quantize it, and look. Gradio is needed for `app` alone."""
