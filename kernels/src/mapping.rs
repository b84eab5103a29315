//! The model file, mapped read-only. The only file the kernels open beside their cache.

use crate::descriptor::TensorRef;
use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;

/// A mapped model file.
pub struct ModelFile {
    map: Mmap,
    file: File,
}

impl ModelFile {
    pub fn open(path: &str) -> Result<Self> {
        let io = |e: std::io::Error| Error::new(Error::IO, format!("{path}: {e}"));
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(Error::new(Error::IO, format!("{path} is no regular file")));
        }
        // SAFETY: the map is read while packing only. Should another process truncate the file meanwhile, the kernel
        // raises SIGBUS; that cannot be excluded for any mapped file, and model files are written once.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { map, file })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A tensor's bytes.
    pub fn tensor(&self, tensor: &TensorRef) -> Result<&[u8]> {
        let range = usize::try_from(tensor.offset)
            .ok()
            .zip(usize::try_from(tensor.bytes).ok())
            .and_then(|(offset, bytes)| Some(offset..offset.checked_add(bytes)?));
        range.and_then(|range| self.map.get(range)).ok_or_else(|| {
            Error::data(format!(
                "tensor {} at {} + {} bytes ends behind the file's {} bytes",
                tensor.name,
                tensor.offset,
                tensor.bytes,
                self.map.len()
            ))
        })
    }
}
