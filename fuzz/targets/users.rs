//! Lines of the guest's `passwd` and `group`, which its user may have written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_envd::users::{parse_group_line, parse_passwd_line};

fuzz_target!(|line: &str| {
    let _ = parse_passwd_line(line);
    let _ = parse_group_line(line);
});
