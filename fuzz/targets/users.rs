//! Lines of the guest's `passwd` and `group`, which are controlled by the guest's user.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_envd::users::{parse_group_line, parse_passwd_line};

fuzz_target!(|line: &str| {
    let _ = parse_passwd_line(line);
    let _ = parse_group_line(line);
});
