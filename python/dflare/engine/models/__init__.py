"""Draft models, found by SGLang's model registry through their class names."""
