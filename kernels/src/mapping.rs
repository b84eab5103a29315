//! The model's files, mapped read-only. The only ones the kernels open beside their cache.

use crate::descriptor::TensorRef;
use crate::error::{Error, Result};
use memmap2::Mmap;
use std::cell::OnceCell;
use std::fs::File;
use std::path::Path;

/// A model's files, opened when something of them is asked for.
pub struct ModelFiles<'a> {
    path: &'a str,
    names: &'a [String],
    open: Vec<OnceCell<ModelFile>>,
}

impl<'a> ModelFiles<'a> {
    /// The file at `path`, and others of these names in its folder.
    pub fn new(path: &'a str, names: &'a [String]) -> Self {
        ModelFiles { path, names, open: (0..=names.len()).map(|_| OnceCell::new()).collect() }
    }

    /// File `index`, 0 being the one at the path.
    pub fn get(&self, index: usize) -> Result<&ModelFile> {
        let open = self.open.get(index).ok_or_else(|| Error::argument(format!("there is no file {index}")))?;
        if let Some(file) = open.get() {
            return Ok(file);
        }
        let file = match index.checked_sub(1) {
            None => ModelFile::open(self.path)?,
            Some(i) => ModelFile::open(&Path::new(self.path).with_file_name(&self.names[i]).to_string_lossy())?,
        };
        Ok(open.get_or_init(|| file))
    }

    /// What is stored of a tensor.
    pub fn tensor(&self, tensor: &TensorRef) -> Result<&[u8]> {
        self.get(tensor.file)?.tensor(tensor)
    }
}

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
