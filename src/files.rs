//! Files that belong to one user alone: keys, pins, the token, certificates, histories.
//!
//! Each is written whole beside its place, and then put there: a kill at any moment leaves the old one or the new one, nobody
//! reads half of one, and nobody but its owner reads it at all. It is on the disk, with its name, when that is done.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tempfile::NamedTempFile;

/// Makes a folder that only its owner may look into, unless it is there.
pub(crate) fn make_private(folder: &Path) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// The folder of a file.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Puts a file in the place of another, if there is one.
pub(crate) fn replace(path: &Path, text: &str) -> io::Result<()> {
    let file = beside(path, text)?;
    // Who changes a file for another user, as root does, leaves it to that user.
    #[cfg(unix)]
    if let Ok(old) = std::fs::metadata(path) {
        use std::os::unix::fs::MetadataExt;
        let _ = std::os::unix::fs::fchown(file.as_file(), Some(old.uid()), Some(old.gid()));
    }
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync(folder_of(path))
}

/// Puts a file where none is; false if there is one.
pub(crate) fn put(path: &Path, text: &str) -> io::Result<bool> {
    let file = beside(path, text)?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Ok(_) => sync(folder_of(path)).map(|()| true),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error.error),
    }
}

/// Has what a folder lists written to the disk.
pub(crate) fn sync(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// A file beside the place of another, for its owner alone from its beginning on; it goes unless it is put there.
fn beside(path: &Path, text: &str) -> io::Result<NamedTempFile> {
    let folder = folder_of(path);
    make_private(folder)?;
    let mut file = tempfile::Builder::new().prefix(".olol-").tempfile_in(folder)?;
    file.write_all(text.as_bytes())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("file");
        assert!(put(&path, "one").unwrap());
        assert!(!put(&path, "two").unwrap(), "there is one");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one");
        replace(&path, "three").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(std::fs::read_dir(folder_of(&path)).unwrap().count(), 1, "nothing is left behind");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&path), mode(folder_of(&path))), (0o600, 0o700));
        }
    }
}
