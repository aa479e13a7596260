//! Recipes of templates. Images are addressed by the content of their recipe: a changed recipe
//! yields another image.

use sha2::{Digest as _, Sha256};
use wrenn_model::{MachineSize, TemplateName, limits};

use crate::build::guest::{self, Programs};

/// Version of the build process. Increased when the process changes in a way that the fields of a
/// recipe do not show.
const FORMAT: &str = "4";

/// Contents and defaults of a template.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Name of the template.
    pub name: &'static str,
    /// Debian release.
    pub suite: &'static str,
    /// Package that depends on the kernel's package.
    pub kernel_package: &'static str,
    /// Kernel modules that are needed for disk and network. They and their dependencies are in the
    /// initramfs. The root file system has all modules.
    pub modules: &'static [&'static str],
    /// Base recipe. Its packages are included and are not unpacked and configured again.
    pub above: Option<&'static Self>,
    /// Packages in addition to those of the base recipe, or to those of a minimal Debian system.
    pub packages: &'static [&'static str],
    /// Default size of a sandbox. The disk is the size of the file system; the image is sparse, so
    /// empty blocks take no space.
    pub size: MachineSize,
    /// User that runs commands when a request names none.
    pub default_user: &'static str,
}

const MINIMAL: Recipe = Recipe {
    name: "minimal",
    suite: "bookworm",
    kernel_package: "linux-image-cloud-amd64",
    modules: &["virtio_mmio", "virtio_blk", "virtio_net"],
    above: None,
    packages: &[
        "ca-certificates",
        "chrony",
        "curl",
        "e2fsprogs",
        "fuse3",
        "git",
        "iproute2",
        "iptables",
        "kmod",
        "nftables",
        "procps",
        "python3",
        "socat",
        "sudo",
        "systemd-standalone-tmpfiles",
        "tini",
    ],
    size: MachineSize {
        vcpus: 1,
        memory_mib: 512,
        disk_mib: limits::DEFAULT_DISK_MIB,
    },
    default_user: "root",
};

/// Default template of clients of the E2B API. It has one CPU where E2B's has two: without hardware
/// virtualization a second one slows a small guest down, because every wake-up passes between two
/// threads of the host.
const BASE: Recipe = Recipe {
    name: "base",
    above: Some(&MINIMAL),
    packages: &["ncurses-bin", "nodejs", "python-is-python3"],
    default_user: "user",
    ..MINIMAL
};

/// Default template of the Wrenn Python client. It has the files of `minimal`, so both have the
/// same image; only the user differs.
const MINIMAL_UBUNTU: Recipe = Recipe {
    name: "minimal-ubuntu",
    default_user: "wrenn-user",
    ..MINIMAL
};

impl Recipe {
    /// All known recipes; a base recipe precedes the recipes that extend it.
    pub const ALL: [Self; 3] = [MINIMAL, MINIMAL_UBUNTU, BASE];

    /// Returns the recipe of a template.
    #[must_use]
    pub fn named(name: &TemplateName) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name == name.as_str())
    }

    /// Returns all packages of the recipe and its base recipes, without those of a minimal Debian
    /// system.
    pub(crate) fn all_packages(&self) -> Vec<&'static str> {
        let mut all = self.above.map(Self::all_packages).unwrap_or_default();
        all.extend(self.packages);
        all
    }

    /// Returns the key of the kernel and initramfs.
    pub(crate) fn kernel_key(&self, programs: &Programs) -> String {
        let mut parts = vec![FORMAT, self.suite, self.kernel_package];
        parts.extend(self.modules);
        let parts = parts.iter().map(|part| part.as_bytes());
        key(parts.chain([&*programs.init]))
    }

    /// Returns the key of the package layer.
    pub(crate) fn layer_key(&self) -> String {
        let below = self.above.map(Self::layer_key);
        let mut parts = vec![FORMAT, self.suite];
        parts.extend(below.as_deref());
        parts.extend(self.packages);
        key(parts.iter().map(|part| part.as_bytes()))
    }

    /// Returns the keys of the package layers of the recipe and its base recipes.
    pub(crate) fn layer_keys(&self) -> Vec<String> {
        let mut keys = self.above.map(Self::layer_keys).unwrap_or_default();
        keys.push(self.layer_key());
        keys
    }

    /// Returns the key of the root file system with Wrenn's programs and the modules of a kernel,
    /// which are identified by their hash.
    pub(crate) fn rootfs_key(&self, programs: &Programs, modules: &str) -> String {
        let layer = self.layer_key();
        let disk = self.size.disk_mib.to_string();
        let parts = [
            FORMAT.as_bytes(),
            layer.as_bytes(),
            disk.as_bytes(),
            &*programs.envd,
            &*programs.init,
            modules.as_bytes(),
        ];
        let guest: Vec<&[u8]> = guest::all_contents().collect();
        key(parts.into_iter().chain(guest))
    }
}

/// Returns the hash of a list. The length of each part is included, so that `ab, c` and `a, bc`
/// differ.
fn key<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..16])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_changes_exactly_when_what_it_stands_for_does() {
        let recipe = MINIMAL;
        let programs = |envd: &str, init: &str| Programs {
            envd: envd.into(),
            init: init.into(),
        };
        let (one, two) = (programs("envd", "init"), programs("envd2", "init"));
        let three = programs("envd", "init2");
        let rootfs_key = |programs: &Programs| recipe.rootfs_key(programs, "modules");
        assert_eq!(rootfs_key(&one), MINIMAL.rootfs_key(&one, "modules"));
        assert_ne!(rootfs_key(&one), rootfs_key(&two));
        assert_ne!(rootfs_key(&one), rootfs_key(&three));
        assert_ne!(rootfs_key(&one), recipe.rootfs_key(&one, "newer modules"));
        assert_eq!(recipe.kernel_key(&one), recipe.kernel_key(&two));
        assert_ne!(recipe.kernel_key(&one), recipe.kernel_key(&three));
        let other = Recipe {
            packages: &["chrony"],
            ..MINIMAL
        };
        assert_ne!(recipe.layer_key(), other.layer_key());
        assert_ne!(rootfs_key(&one), other.rootfs_key(&one, "modules"));
        assert_eq!(recipe.kernel_key(&one), other.kernel_key(&one));
        let other = Recipe {
            modules: &["virtio_blk"],
            ..MINIMAL
        };
        assert_ne!(recipe.kernel_key(&one), other.kernel_key(&one));
    }

    #[test]
    fn a_recipe_above_another_has_all_of_it_and_changes_with_it() {
        let programs = Programs {
            envd: b"envd".to_vec(),
            init: b"init".to_vec(),
        };
        assert_eq!(BASE.kernel_key(&programs), MINIMAL.kernel_key(&programs));
        assert_ne!(BASE.layer_key(), MINIMAL.layer_key());
        let all = BASE.all_packages();
        assert!(all.contains(&"tini") && all.contains(&"nodejs"));
        const OTHER: Recipe = Recipe {
            packages: &["chrony"],
            ..MINIMAL
        };
        let above_other = Recipe {
            above: Some(&OTHER),
            ..BASE
        };
        assert_ne!(above_other.layer_key(), BASE.layer_key());
    }

    #[test]
    fn template_that_differs_in_its_user_has_the_image_of_the_other() {
        let programs = Programs {
            envd: b"envd".to_vec(),
            init: b"init".to_vec(),
        };
        let rootfs = |recipe: &Recipe| recipe.rootfs_key(&programs, "modules");
        assert_eq!(rootfs(&MINIMAL_UBUNTU), rootfs(&MINIMAL));
        assert_ne!(MINIMAL_UBUNTU.default_user, MINIMAL.default_user);
    }

    #[test]
    fn every_user_has_a_home_and_a_home_has_a_user() {
        let users: Vec<_> = guest::USER_LINES
            .iter()
            .filter(|(path, _)| *path == "etc/passwd")
            .map(|(_, line)| line.split(':').collect::<Vec<_>>())
            .collect();
        for (home, id) in guest::HOMES {
            let has = |user: &&Vec<&str>| user[5].strip_prefix('/') == Some(home);
            let user = users.iter().find(has).expect("a user");
            assert_eq!((user[2], user[3]), (&*id.to_string(), &*id.to_string()));
        }
        assert_eq!(users.len(), guest::HOMES.len());
        for recipe in Recipe::ALL {
            let user = recipe.default_user;
            assert!(user == "root" || users.iter().any(|line| line[0] == user));
        }
    }

    #[test]
    fn where_one_part_ends_matters() {
        let key = |parts: &[&str]| super::key(parts.iter().map(|p| p.as_bytes()));
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
    }

    #[test]
    fn every_recipe_has_a_valid_name() {
        for recipe in Recipe::ALL {
            let name: TemplateName = recipe.name.parse().expect("valid");
            assert!(Recipe::named(&name).is_some());
        }
    }
}
