//! Lines of QMP, the control protocol of QEMU. A guest that has broken out of QEMU can send any
//! line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_qmp::{Message, parse_message};

fuzz_target!(|bytes: &[u8]| {
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some(message) = std::str::from_utf8(line).ok().and_then(parse_message) else {
            continue;
        };
        if let Message::Greeting(Some(version)) = message {
            assert_eq!(version.split('.').count(), 3);
            assert!(
                version
                    .split('.')
                    .all(|number| number.parse::<u64>().is_ok())
            );
        }
    }
});
