//! Lines of the kernel's socket tables, and the set of ports that are forwarded because of them.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use libfuzzer_sys::fuzz_target;
use wrenn_envd::ports::{
    plan::Plan,
    table::{Line, parse_line},
};

fuzz_target!(|table: &[u8]| {
    let mut plan = Plan::new(IpAddr::V4(Ipv4Addr::new(169, 254, 0, 21)));
    for line in table.split(|byte| *byte == b'\n') {
        if let Line::Listener(listener) = parse_line(line) {
            plan.add(listener, false);
        }
    }
    for (port, target) in plan.wanted() {
        assert_eq!(port, target.address.port());
        assert!(target.address.ip().is_loopback());
        assert_eq!(plan.target(port), Some(target));
    }
});
