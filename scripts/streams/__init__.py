"""The subjects of an inference: found, copied from an object store, recorded when they are finished."""
