//! The folder for what the library can make again and does not want to: measurements of this device, packed weights.
//!
//! Nothing here is needed: whoever cannot read or write it does without, and says so.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// `LUTRA_CACHE`, else `lutra` in the user's cache folder (`XDG_CACHE_HOME`, or what the system has in its place); `None` where
/// there is no such folder. It may not exist yet.
pub fn folder() -> Option<PathBuf> {
    folder_of(&|name| std::env::var_os(name))
}

fn folder_of(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // The XDG specification: a relative path is to be ignored.
    let path = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(own) = variable("LUTRA_CACHE").filter(|value| !value.is_empty()) {
        return Some(PathBuf::from(own));
    }
    let user = if cfg!(windows) {
        path("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        path("HOME").map(|home| home.join("Library/Caches"))
    } else {
        path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")))
    };
    Some(user?.join("lutra"))
}

/// Writes a file such that readers, also after a power cut, see either what was there before or all of `bytes`. Its folder is
/// made.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    // Of a name that no other process or thread takes, in the same file system.
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}-{}.tmp", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let temporary = folder.join(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_the_users_or_the_one_named() {
        let folder = |variables: &[(&str, &str)]| {
            folder_of(&|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
        };
        assert_eq!(folder(&[("LUTRA_CACHE", "/a/b"), ("HOME", "/h")]), Some("/a/b".into()));
        assert_eq!(folder(&[("LUTRA_CACHE", "here")]), Some("here".into()));
        assert_eq!(folder(&[]), None);
        if cfg!(target_os = "linux") {
            assert_eq!(folder(&[("HOME", "/h")]), Some("/h/.cache/lutra".into()));
            assert_eq!(folder(&[("HOME", "/h"), ("LUTRA_CACHE", "")]), Some("/h/.cache/lutra".into()));
            assert_eq!(folder(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Some("/x/lutra".into()));
            assert_eq!(folder(&[("HOME", "/h"), ("XDG_CACHE_HOME", "x")]), Some("/h/.cache/lutra".into()));
        }
    }

    #[test]
    fn replacing_is_whole_and_leaves_nothing_behind() {
        let folder = std::env::temp_dir().join(format!("lutra-cache-test-{}", std::process::id()));
        let path = folder.join("deep/file");
        replace(&path, b"first").unwrap();
        let texts: Vec<String> = (0..4).map(|i| i.to_string().repeat(100_000)).collect();
        std::thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| (0..20).for_each(|_| replace(&path, text.as_bytes()).unwrap()));
            }
            for _ in 0..200 {
                let seen = fs::read_to_string(&path).unwrap();
                assert!(seen == "first" || texts.contains(&seen), "{} bytes of a mixture", seen.len());
            }
        });
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        // A folder in its place.
        assert!(replace(path.parent().unwrap(), b"").is_err());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(folder).unwrap();
    }
}
