"""Which binaries come with these files: a checkpoint that has some carries a copy of this that names their manifest."""

MANIFEST = ""
"""The SHA-256 of ``kernels/aot/manifest.json`` beside the checkpoint's weights; "": there are no binaries."""
