"""Everything that touches SGLang: plug-in, platform, worker, draft model, attention backend."""
