//! `/files`: uploads and downloads are complete and unchanged, and use constant memory in the
//! agent.

use std::io::{Read as _, Write as _};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use sha2::{Digest as _, Sha256};

use crate::{
    calls::clients,
    raw::{self, call, connect},
    world::{World, eventually, run},
};

const MB: usize = 1_000_000;

/// Returns bytes that do not repeat (xorshift).
fn bytes(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn upload(path: &str, headers: &str, body: &[u8]) -> raw::Answer {
    call(
        &format!(
            "POST /files?path={path} HTTP/1.1\r\ncontent-type: application/octet-stream{headers}"
        ),
        body,
    )
}

fn download(path: &str, headers: &str) -> raw::Answer {
    call(&format!("GET /files?path={path} HTTP/1.1{headers}"), b"")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    GzDecoder::new(bytes).read_to_end(&mut plain).expect("gzip");
    plain
}

fn form(content: &[u8], name: &str) -> Vec<u8> {
    let head = format!(
        "--B\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n"
    );
    [head.as_bytes(), content, b"\r\n--B--\r\n"].concat()
}

#[test]
fn each_size_comes_back_as_it_went_in_every_form() {
    run(async |world| {
        for length in [0, 1, 65_535, 65_536, 65_537, 3 * MB] {
            let content = bytes(length);
            let path = "/mnt/work/f";
            let check = |how: &str| {
                assert!(
                    std::fs::read(world.path(path)).expect("there") == content,
                    "{how} {length}"
                )
            };
            assert_eq!(upload(path, "", &content).status, 200);
            check("plain");
            assert_eq!(
                upload(path, "\r\ncontent-encoding: gzip", &gzip(&content)).status,
                200
            );
            check("gzip");
            let head = "POST /files HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=B";
            assert_eq!(call(head, &form(&content, path)).status, 200);
            check("form");
            let head = format!("{head}\r\ncontent-encoding: gzip");
            assert_eq!(call(&head, &gzip(&form(&content, path))).status, 200);
            check("gzipped form");
            let chunked: Vec<u8> = content
                .chunks(7000)
                .flat_map(|c| [format!("{:x}\r\n", c.len()).as_bytes(), c, b"\r\n"].concat())
                .chain(*b"0\r\n\r\n")
                .collect();
            assert_eq!(
                upload(path, "\r\ntransfer-encoding: chunked", &chunked).status,
                200
            );
            check("chunked");
            let plain = download(path, "");
            assert!(plain.complete && plain.body == content, "{length}");
            assert_eq!(
                plain.header("content-length"),
                Some(length.to_string().as_str())
            );
            let packed = download(path, "\r\naccept-encoding: gzip, deflate");
            assert_eq!(packed.header("content-encoding"), Some("gzip"));
            assert!(
                packed.complete && gunzip(&packed.body) == content,
                "{length}"
            );
        }
    });
}

fn sum(world: &World, path: &str) -> Vec<u8> {
    Sha256::digest(std::fs::read(world.path(path)).expect("there")).to_vec()
}

#[test]
fn fifty_megabytes_pass_through_a_small_agent() {
    run(async |world| {
        let content = bytes(50 * MB);
        let wanted = Sha256::digest(&content).to_vec();
        clients(world).sh("true").await;
        assert_eq!(
            download("/etc/passwd", "\r\naccept-encoding: gzip").status,
            200
        );
        let before = world.agent_status("VmRSS");
        world.reset_peak();
        assert_eq!(upload("/mnt/work/f", "", &content).status, 200);
        assert!(sum(world, "/mnt/work/f") == wanted);
        assert_eq!(
            upload("/mnt/work/g", "\r\ncontent-encoding: gzip", &gzip(&content)).status,
            200
        );
        assert!(sum(world, "/mnt/work/g") == wanted);
        let head = "POST /files HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=B";
        assert_eq!(call(head, &form(&content, "/mnt/work/h")).status, 200);
        assert!(sum(world, "/mnt/work/h") == wanted);
        let answer = download("/mnt/work/f", "");
        assert!(answer.complete && Sha256::digest(&answer.body).to_vec() == wanted);
        let answer = download("/mnt/work/f", "\r\naccept-encoding: gzip");
        assert!(answer.complete && Sha256::digest(gunzip(&answer.body)).to_vec() == wanted);
        let grown = world.agent_status("VmHWM").saturating_sub(before);
        assert!(grown < 16 * 1024, "the agent grew by {grown} KiB");
    });
}

#[test]
fn a_small_packed_body_that_unpacks_to_much_needs_no_room() {
    run(async |world| {
        clients(world).sh("true").await;
        let before = world.agent_status("VmRSS");
        world.reset_peak();
        let packed = gzip(&vec![0; 100 * MB]);
        assert_eq!(
            upload("/mnt/work/f", "\r\ncontent-encoding: gzip", &packed).status,
            200
        );
        assert_eq!(
            std::fs::metadata(world.path("/mnt/work/f"))
                .expect("there")
                .len(),
            100 * MB as u64
        );
        assert!(world.agent_status("VmHWM") < before + 16 * 1024);
    });
}

#[test]
fn broken_bodies_are_errors() {
    run(async |_| {
        let packed = gzip(&bytes(100_000));
        for bad in [&packed[..packed.len() / 2], b"no gzip at all", b""] {
            assert_eq!(
                upload("/mnt/work/f", "\r\ncontent-encoding: gzip", bad).status,
                400
            );
        }
        let mut damaged = packed.clone();
        let length = damaged.len();
        damaged[length - 6] ^= 1;
        assert_eq!(
            upload("/mnt/work/f", "\r\ncontent-encoding: gzip", &damaged).status,
            400
        );
        assert_eq!(
            upload("/mnt/work/f", "\r\ncontent-encoding: br", b"x").status,
            400
        );
        assert_eq!(
            upload("/mnt/work/f", "\r\ntransfer-encoding: chunked", b"zz\r\n").status,
            400
        );
    });
}

#[test]
fn an_upload_that_must_be_whole_leaves_what_was_there_when_it_breaks_off() {
    run(async |world| {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        let whole = "\r\nwrenn-upload-whole: 1";
        let broken = gzip(&bytes(100_000));
        let broken = &broken[..broken.len() / 2];
        let encoded = format!("{whole}\r\ncontent-encoding: gzip");
        let names = || {
            std::fs::read_dir(world.path("/mnt/work"))
                .expect("there")
                .count()
        };
        assert_eq!(upload("/mnt/work/f", &encoded, broken).status, 400);
        assert_eq!(names(), 0);
        world.write("/mnt/work/f", "before");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(world.path("/mnt/work/f"), mode).expect("changed");
        assert_eq!(upload("/mnt/work/f", &encoded, broken).status, 400);
        assert_eq!(world.read("/mnt/work/f"), "before");
        // The client disconnects in the middle.
        let mut stream = connect();
        let head = format!(
            "POST /files?path=/mnt/work/f&username=user HTTP/1.1{whole}\r\ncontent-type: application/octet-stream\r\n\
             content-length: 1000000\r\nhost: localhost\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        stream.write_all(&[1; 100_000]).expect("sent");
        eventually("a temporary file exists", async || names() == 2).await;
        drop(stream);
        eventually("the temporary file is removed", async || names() == 1).await;
        assert_eq!(world.read("/mnt/work/f"), "before");
        // A complete upload replaces the content. The file's mode does not change.
        let path = "/mnt/work/f&username=user";
        assert_eq!(upload(path, whole, b"after").status, 200);
        assert_eq!(world.read("/mnt/work/f"), "after");
        let there = std::fs::metadata(world.path("/mnt/work/f")).expect("there");
        assert_eq!((there.uid(), there.mode() & 0o777), (1000, 0o755));
        assert_eq!(names(), 1);
    });
}

#[test]
fn a_file_that_shrinks_while_it_is_sent_ends_in_a_cut_connection() {
    run(async |world| {
        world.write("/mnt/work/f", vec![1; 40 * MB]);
        let mut stream = connect();
        raw::send(&mut stream, "GET /files?path=/mnt/work/f HTTP/1.1", b"");
        let mut first = [0; 1000];
        stream.read_exact(&mut first).expect("it begins");
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(world.path("/mnt/work/f"))
            .expect("there");
        file.set_len(30 * MB as u64).expect("cut");
        let mut length = first.len();
        let mut piece = vec![0; 65536];
        while let Ok(read @ 1..) = stream.read(&mut piece) {
            length += read;
        }
        assert!(length < 40 * MB, "not the promised length: {length}");
    });
}

#[test]
fn clients_who_go_away_in_the_middle_leave_nothing_open() {
    run(async |world| {
        world.write("/mnt/work/f", vec![1; 40 * MB]);
        assert_eq!(download("/etc/passwd", "").status, 200);
        let before = world.descriptors();
        for _ in 0..20 {
            let mut reader = connect();
            raw::send(&mut reader, "GET /files?path=/mnt/work/f HTTP/1.1", b"");
            reader.read_exact(&mut [0; 1000]).expect("it begins");
            let mut writer = connect();
            writer
                .write_all(b"POST /files?path=/mnt/work/g HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nsome")
                .expect("sent");
        }
        eventually("descriptors are closed", async || {
            world.descriptors() <= before + 2
        })
        .await;
    });
}
