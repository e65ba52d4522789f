"""The folder that an export writes: manifest, reader, writer."""
