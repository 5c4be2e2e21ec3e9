"""The format on disk: manifest, Zarr documents, names, checksums and codecs."""
