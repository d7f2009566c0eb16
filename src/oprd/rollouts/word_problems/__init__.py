"""The bundled task for real language models: grade-school word problems of one to three steps."""
