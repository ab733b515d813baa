"""The C++ extension: importing it registers the ops of `torch.ops.metaadamw_fast`."""

source_hash: str
