//! Tests of the content of a store after each step, and after a crash between two steps.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::{collections::HashSet, fs, path::Path, sync::Arc};

use wrenn_model::MachineSize;
use wrenn_proto::{
    machine::{MachineProfile, VmmKind},
    supervise::Accel,
};
use wrenn_snapshot::{
    Chain, DiffWriter, Earlier, Header, ImageFile, Layer, Manifest, NewLayer, Requirements,
    SnapshotId, Store, StoreError, layout, verify_layer,
};
use wrenn_store::{Artifact, Content, Kind};

const BYTES: u64 = 16 * 4096;

fn manifest(build: SnapshotId, layers: Vec<SnapshotId>) -> Manifest {
    Manifest {
        version: Manifest::VERSION,
        build,
        created_unix_ms: 1,
        requires: Requirements {
            vmm: "qemu 7.2".into(),
            accel: Accel::Tcg,
            cpu: "max".parse().unwrap(),
            machine: MachineProfile::current(VmmKind::Qemu),
            host_cpu: None,
        },
        size: MachineSize {
            vcpus: 1,
            memory_mib: 1,
            disk_mib: 1,
        },
        kernel: ImageFile::at("/k".into()),
        initrd: ImageFile::at("/i".into()),
        base_disk: ImageFile::at("/b".into()),
        disk_layers: layers.into_iter().map(Layer::unknown).collect(),
        memory: Vec::new(),
        header: None,
        device: None,
        device_checksum: None,
        template: "minimal".into(),
        default_user: "root".into(),
        guest_token: "t".into(),
        envs: [("A".to_owned(), "1".to_owned())].into(),
    }
}

/// Writes a snapshot with one changed page and publishes it.
fn publish(
    store: &Store,
    parent: Option<&Header>,
    below: &[SnapshotId],
) -> Result<(SnapshotId, Header), StoreError> {
    publish_with(store, parent, below, "layer".as_ref(), false)
}

/// Same as [`publish`], with the name of the layer's file, which may be open in a VMM.
fn publish_with(
    store: &Store,
    parent: Option<&Header>,
    below: &[SnapshotId],
    disk: &Path,
    is_open: bool,
) -> Result<(SnapshotId, Header), StoreError> {
    let build = SnapshotId::random();
    let stage = store.stage(build)?;
    let parent = parent.map(|header| {
        let chain = Chain::open(&[store.memory_dir()], header).unwrap();
        (header.clone(), Arc::new(chain))
    });
    let page = parent
        .as_ref()
        .map_or(0, |(header, _)| header.generation() + 1);
    let mut writer =
        DiffWriter::create(&stage.path().join(layout::MEMORY), build, BYTES, parent).unwrap();
    writer.push(page * 4096, &[7; 4096]).unwrap();
    let (header, _) = writer.finish().unwrap();
    fs::write(stage.path().join(layout::HEADER), header.to_bytes()).unwrap();
    fs::write(stage.path().join(layout::DEVICE), "state").unwrap();
    // An absolute path stays what it is.
    let disk = stage.path().join(disk);
    fs::write(&disk, "layer").unwrap();
    let layers = [below, &[build]].concat();
    let layer = NewLayer {
        build,
        path: disk,
        is_open,
    };
    stage.publish(&manifest(build, layers), &[layer], &Earlier::default())?;
    Ok((build, header))
}

fn collect(store: &Store, live: HashSet<SnapshotId>) -> u64 {
    store.collect(|| Ok::<_, StoreError>(live)).unwrap()
}

fn files(root: &Path, area: &str) -> usize {
    fs::read_dir(root.join(area)).unwrap().count()
}

#[test]
fn referenced_files_are_kept_and_others_collected() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (first, header) = publish(&store, None, &[]).unwrap();
    let (second, header) = publish(&store, Some(&header), &[first]).unwrap();
    let (third, _) = publish(&store, Some(&header), &[first, second]).unwrap();
    assert_eq!(store.list().unwrap().len(), 3);
    assert_eq!(files(root.path(), "staging"), 0);

    // The third snapshot depends on the memory and the disks of both others.
    collect(&store, HashSet::from([third]));
    assert!(matches!(
        store.snapshot(first),
        Err(StoreError::NotFound(_))
    ));
    assert_eq!(
        (files(root.path(), "memory"), files(root.path(), "disks")),
        (3, 3)
    );
    let header = store.header(third).unwrap();
    let chain = Chain::open(&[store.memory_dir()], &header).unwrap();
    let mut memory = vec![0; 3 * 4096];
    chain.read_at(0, &mut memory).unwrap();
    assert_eq!(memory, [7; 3 * 4096]);

    let freed = collect(&store, HashSet::new());
    assert!(freed > 0);
    assert_eq!(
        (files(root.path(), "memory"), files(root.path(), "disks")),
        (0, 0)
    );
    assert_eq!(files(root.path(), "snapshots"), 0);
}

#[test]
fn dropped_snapshot_leaves_nothing_and_a_staged_one_is_kept() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let stage = store.stage(SnapshotId::random()).unwrap();
    fs::write(stage.path().join(layout::MEMORY), "half").unwrap();
    collect(&store, HashSet::from([stage.build()]));
    assert!(stage.path().is_dir());
    drop(stage);
    assert_eq!(files(root.path(), "staging"), 0);
}

#[test]
fn snapshot_with_a_missing_file_is_not_published() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let build = SnapshotId::random();
    let stage = store.stage(build).unwrap();
    let error = stage
        .publish(&manifest(build, vec![]), &[], &Earlier::default())
        .unwrap_err();
    assert!(error.to_string().contains(layout::DEVICE), "{error}");
    assert_eq!(
        (
            files(root.path(), "staging"),
            files(root.path(), "snapshots")
        ),
        (0, 0)
    );
}

#[test]
fn files_left_by_a_crash_are_collected() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (kept, _) = publish(&store, None, &[]).unwrap();
    // State after a crash during publishing: files are in place, but no snapshot exists.
    for path in ["memory/{}.mem", "disks/{}.qcow2"] {
        let path = path.replace("{}", &SnapshotId::random().to_string());
        fs::write(root.path().join(path), "garbage").unwrap();
    }
    fs::create_dir(
        root.path()
            .join("staging")
            .join(SnapshotId::random().to_string()),
    )
    .unwrap();
    collect(&store, HashSet::from([kept]));
    for area in ["memory", "disks", "snapshots"] {
        assert_eq!(files(root.path(), area), 1, "{area}");
    }
    assert_eq!(files(root.path(), "staging"), 0);
}

#[test]
fn unreadable_snapshot_keeps_all_diff_files_and_layers() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (first, header) = publish(&store, None, &[]).unwrap();
    let (second, _) = publish(&store, Some(&header), &[first]).unwrap();
    let path = root
        .path()
        .join("snapshots")
        .join(second.to_string())
        .join(layout::HEADER);
    fs::write(&path, "damaged").unwrap();
    let error = store.header(second).unwrap_err();
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    collect(&store, HashSet::from([second]));
    assert_eq!(files(root.path(), "memory"), 2);
}

#[test]
fn a_damaged_device_state_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (build, _) = publish(&store, None, &[]).unwrap();
    let snapshot = store.snapshot(build).unwrap();
    snapshot.verify_devices().unwrap();
    let path = snapshot.dir.join(layout::DEVICE);
    fs::write(&path, "stale").unwrap();
    let error = snapshot.verify_devices().unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
}

#[test]
fn manifest_describes_the_content_of_each_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (first, header) = publish(&store, None, &[]).unwrap();
    let (second, _) = publish(&store, Some(&header), &[first]).unwrap();
    let snapshot = store.snapshot(second).unwrap();
    let content = |path: &Path| Content::of(&fs::File::open(path).unwrap()).unwrap();
    let of = |kind, build: SnapshotId, path: &Path| Artifact {
        id: build.artifact(kind),
        content: content(path),
    };
    let layer = |build| of(Kind::Disk, build, &store.layer(build));
    let expected = [
        layer(first),
        layer(second),
        of(Kind::Memory, first, &store.diff(first)),
        of(Kind::Memory, second, &store.diff(second)),
        of(Kind::Header, second, &snapshot.dir.join(layout::HEADER)),
        of(Kind::Device, second, &snapshot.dir.join(layout::DEVICE)),
    ];
    assert_eq!(snapshot.manifest.artifacts().collect::<Vec<_>>(), expected);
}

#[test]
fn snapshot_staged_during_a_collection_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let build = SnapshotId::random();
    let mut stage = None;
    let live = || {
        stage = Some(store.stage(build).unwrap());
        Ok::<_, StoreError>(HashSet::new())
    };
    store.collect(live).unwrap();
    assert!(stage.unwrap().path().is_dir());
}

#[test]
fn nothing_is_collected_if_the_references_are_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (build, _) = publish(&store, None, &[]).unwrap();
    let unknown = || Err(StoreError::NotFound(build));
    store.collect(unknown).unwrap_err();
    store.snapshot(build).unwrap();
}

#[test]
fn a_layer_that_a_vmm_may_write_to_is_another_file_in_the_store() {
    let (root, vm) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Store::open(root.path()).unwrap();
    let disk = vm.path().join("rootfs.qcow2");
    let (build, _) = publish_with(&store, None, &[], &disk, true).unwrap();
    // The VMM changes its file through the descriptor that it holds.
    fs::write(&disk, "hostile").unwrap();
    let layer = store.layer(build);
    assert_eq!(fs::read(&layer).unwrap(), b"layer");
    verify_layer(&layer).unwrap();
    fs::remove_file(&layer).unwrap();
    fs::write(&layer, "lager").unwrap();
    let error = verify_layer(&layer).unwrap_err();
    assert!(
        matches!(&error, StoreError::Checksum(path) if *path == layer),
        "{error}"
    );
    // The checksum goes with its layer.
    assert_eq!(files(root.path(), "disks"), 2);
    collect(&store, HashSet::new());
    assert_eq!(files(root.path(), "disks"), 0);
}

#[test]
fn a_layer_without_checksum_gets_it_when_its_snapshot_is_sealed() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (first, header) = publish(&store, None, &[]).unwrap();
    let (second, _) = publish(&store, Some(&header), &[first]).unwrap();
    for layer in [first, second].map(|build| store.layer(build)) {
        verify_layer(&layer).unwrap();
    }
    store.seal(second).unwrap();
    store.seal(second).unwrap();
    for layer in [first, second].map(|build| store.layer(build)) {
        verify_layer(&layer).unwrap();
        fs::write(&layer, "other").unwrap();
        verify_layer(&layer).unwrap_err();
    }
}
