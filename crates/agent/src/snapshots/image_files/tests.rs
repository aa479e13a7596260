use super::*;

/// Creates the files of an image store, with a file system that was created at a time.
pub(in crate::snapshots) fn image_store(dir: &Path, made_sec: u32) {
    for kind in KINDS {
        fs::create_dir_all(dir.join(kind).join("key")).unwrap();
    }
    let mut image = vec![0; 4096];
    image[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
    image[1024 + 0x108..][..4].copy_from_slice(&made_sec.to_le_bytes());
    fs::write(dir.join("kernels/key/vmlinux"), "kernel").unwrap();
    fs::write(dir.join("kernels/key/initrd.img"), "initrd").unwrap();
    fs::write(dir.join("rootfs/key/rootfs.ext4"), image).unwrap();
}

/// Returns a manifest of version 1 whose files are in an image directory, which may be empty.
pub(in crate::snapshots) fn manifest(images_dir: &str) -> Manifest {
    let text = serde_json::json!({
        "version": 1, "build": "0".repeat(32), "created_unix_ms": 2000, "vmm": "qemu 7.2.22",
        "accel": "tcg", "cpu": "max", "vcpus": 1, "memory_mib": 256, "disk_mib": 5120,
        "kernel": format!("{images_dir}kernels/key/vmlinux"),
        "initrd": format!("{images_dir}kernels/key/initrd.img"),
        "base_disk": format!("{images_dir}rootfs/key/rootfs.ext4"),
        "disk_layers": [], "template": "minimal", "default_user": "root", "guest_token": "t",
    });
    Manifest::parse(text.to_string().as_bytes()).unwrap()
}

fn image_files(images_dir: &Path) -> ImageFiles {
    ImageFiles::of(images_dir, Path::new("/nowhere"))
}

/// Returns a manifest whose files are described as those of an image directory.
fn described(images: &Path) -> Manifest {
    let mut made = manifest(&format!("{}/", images.display()));
    image_files(images).describe(&mut made);
    made
}

/// Returns the paths of a manifest.
fn paths(manifest: &Manifest) -> [PathBuf; 3] {
    [&manifest.kernel, &manifest.initrd, &manifest.base_disk].map(|file| file.path.clone())
}

#[test]
fn manifest_names_files_of_the_image_directory_by_their_content() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    image_store(&images, 1);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&images, &link).unwrap();
    let first = described(&images);
    assert_eq!(paths(&first), paths(&manifest("")));
    assert_eq!(described(&link), first);
    let ids: Vec<_> = first.artifacts().map(|artifact| artifact.id).collect();
    let kinds: Vec<_> = ids.iter().map(|id| id.kind()).collect();
    assert_eq!(kinds, [Kind::Kernel, Kind::Initrd, Kind::Rootfs]);
    // Files elsewhere keep their paths, and files that do not exist have no content.
    let mut elsewhere = manifest(&format!("{}/", images.display()));
    image_files(dir.path()).describe(&mut elsewhere);
    assert_eq!(
        elsewhere.kernel.path,
        Path::new("images/kernels/key/vmlinux")
    );
    let mut gone = manifest("/gone/");
    image_files(&images).describe(&mut gone);
    assert_eq!(gone, manifest("/gone/"));
}

#[test]
fn files_are_found_by_their_content_after_a_move_a_copy_and_another_build() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    image_store(&images, 1);
    let stored = described(&images);
    let locate = |stored: &Manifest, root: &Path, holder| {
        let mut found = stored.clone();
        image_files(root).locate(&mut found, holder);
        paths(&found)
    };
    let at = |root: &Path| paths(&manifest(&format!("{}/", root.display())));
    // A copy in another directory, with other modification times.
    let copy = dir.path().join("copy");
    image_store(&copy, 1);
    for holder in [Holder::DataDir, Holder::ImageDir] {
        assert_eq!(locate(&stored, &images, holder), at(&images));
        assert_eq!(locate(&stored, &copy, holder), at(&copy));
    }
    // Another key, as another version of the recipe has.
    fs::rename(copy.join("rootfs/key"), copy.join("rootfs/other")).unwrap();
    let [_, _, disk] = locate(&stored, &copy, Holder::DataDir);
    assert_eq!(disk, copy.join("rootfs/other/rootfs.ext4"));
    // An image that was built again under the same key is another one.
    let again = dir.path().join("again");
    image_store(&again, 7);
    let [kernel, _, disk] = locate(&stored, &again, Holder::DataDir);
    assert_eq!(kernel, again.join("kernels/key/vmlinux"));
    assert!(!disk.exists(), "{}", disk.display());
    // The setting names another directory: the file is where it was.
    let mut elsewhere = manifest(&format!("{}/", images.display()));
    image_files(&again).describe(&mut elsewhere);
    let [_, _, disk] = locate(&elsewhere, &again, Holder::DataDir);
    assert_eq!(disk, images.join("rootfs/key/rootfs.ext4"));
}

#[test]
fn files_of_version_1_are_found_after_a_move_by_name_and_by_their_former_path() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    image_store(&images, 1);
    let here = format!("{}/", images.display());
    let located = |stored: &str, holder| {
        let mut stored = manifest(stored);
        image_files(&images).locate(&mut stored, holder);
        stored
    };
    for holder in [Holder::DataDir, Holder::ImageDir] {
        assert_eq!(located("", holder), manifest(&here));
        assert_eq!(located("/gone/images/", holder), manifest(&here));
    }
    // After a copy, the former directory exists as well.
    let other = dir.path().join("other");
    image_store(&other, 1);
    let there = format!("{}/", other.display());
    assert_eq!(located(&there, Holder::DataDir), manifest(&there));
    assert_eq!(located(&there, Holder::ImageDir), manifest(&here));
}

#[test]
fn image_that_was_built_after_a_snapshot_of_version_1_is_not_taken_for_its_image() {
    let dir = tempfile::tempdir().unwrap();
    image_store(dir.path(), 3);
    let mut stored = manifest("/gone/");
    image_files(dir.path()).locate(&mut stored, Holder::DataDir);
    assert_eq!(stored.base_disk, manifest("/gone/").base_disk);
    // A relative name is that of this directory. The clock may have been wrong.
    let image = dir.path().join("rootfs/key/rootfs.ext4");
    let located = |uuid: Option<char>| {
        let mut stored = manifest("");
        stored.base_disk.uuid = uuid.map(|digit| digit.to_string().repeat(32));
        image_files(dir.path()).locate(&mut stored, Holder::DataDir);
        stored.base_disk.path
    };
    assert_eq!(
        (located(None), located(Some('0'))),
        (image.clone(), image.clone())
    );
    let other = located(Some('1'));
    assert!(other != image && !other.exists(), "{}", other.display());
}
