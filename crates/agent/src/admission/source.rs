//! Choice between the image of a template and its snapshot.

use wrenn_model::MachineSize;

/// True if the template snapshot may be restored instead of booting the image. A snapshot has the
/// size of its template, so a request for another size cannot use it.
pub(super) fn may_restore(enabled: bool, requested: MachineSize, template: MachineSize) -> bool {
    enabled && requested == template
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_size_of_the_template_is_restored() {
        let template = MachineSize {
            vcpus: 1,
            memory_mib: 512,
            disk_mib: 5120,
        };
        assert!(may_restore(true, template, template));
        assert!(!may_restore(false, template, template));
        for other in [
            MachineSize {
                vcpus: 2,
                ..template
            },
            MachineSize {
                memory_mib: 513,
                ..template
            },
            MachineSize {
                disk_mib: 5121,
                ..template
            },
        ] {
            assert!(!may_restore(true, other, template), "{other:?}");
        }
    }
}
