//! Driver without a virtual machine, for tests of code that controls VMs. An ordinary process
//! stands in for the VMM.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{net::unix::pipe, process::Child, time::timeout};

use crate::{
    ControlError, DiskForm, LaunchError, Machine, MachineConfig, MachineExit, MachineFds,
    MemoryAccess, SavedMemory, StopError, VmmDriver,
};

/// Placeholder for the state of CPUs and devices.
const DEVICE_STATE: &[u8] = b"a stand-in's state";

/// Starts a shell command as the "VM". Its standard output is the console.
#[derive(Debug, Clone)]
pub struct FakeDriver {
    /// Script that the shell runs.
    pub script: String,
    /// Kind and version that the "VMM" reports; empty for none.
    pub version: String,
}

/// Process that stands in for a VM.
#[derive(Debug)]
pub struct FakeMachine {
    child: Child,
    pid: u32,
    version: String,
    console: Option<pipe::Receiver>,
    exit: Option<MachineExit>,
}

impl FakeMachine {
    fn signal(&self, signal: Signal) -> Result<(), ControlError> {
        let pid = Pid::from_raw(i32::try_from(self.pid).unwrap_or(i32::MAX));
        kill(pid, signal)
            .map_err(io::Error::from)
            .map_err(failed("signal the process"))
    }
}

/// Sends the memory layout that a VMM reports at boot. The addresses are made up, because a
/// stand-in has no guest memory.
fn send_layout(config: &MachineConfig, pager: OwnedFd) -> io::Result<()> {
    let layout = serde_json::json!([{
        "base_host_virt_addr": 0x7000_0000_0000_u64,
        "size": config.size.memory_bytes(),
        "offset": 0,
        "page_size": 4096,
    }]);
    UnixStream::from(pager).write_all(layout.to_string().as_bytes())
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> ControlError {
    move |source| ControlError::Io { step, source }
}

impl VmmDriver for FakeDriver {
    type Machine = FakeMachine;

    fn disk_form(&self) -> DiskForm {
        DiskForm::Qcow2Chain
    }

    async fn launch(
        &self,
        config: MachineConfig,
        fds: MachineFds,
    ) -> Result<FakeMachine, LaunchError> {
        let io = |step| move |source| LaunchError::Io { step, source };
        send_layout(&config, fds.pager).map_err(io("report the memory layout"))?;
        let (sender, console) = pipe::pipe().map_err(io("create a pipe"))?;
        let output = sender.into_blocking_fd().map_err(io("create a pipe"))?;
        let child = tokio::process::Command::new("sh")
            .args(["-c", &self.script])
            .stdin(Stdio::null())
            .stdout(output)
            .kill_on_drop(true)
            .spawn()
            .map_err(io("start the shell"))?;
        let pid = child.id().unwrap_or_default();
        Ok(FakeMachine {
            child,
            pid,
            version: self.version.clone(),
            console: Some(console),
            exit: None,
        })
    }
}

impl Machine for FakeMachine {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn take_console(&mut self) -> Option<pipe::Receiver> {
        self.console.take()
    }

    async fn pause(&mut self) -> Result<(), ControlError> {
        self.signal(Signal::SIGSTOP)
    }

    fn is_stalled(&self) -> bool {
        false
    }

    async fn resume(&mut self) -> Result<(), ControlError> {
        self.signal(Signal::SIGCONT)
    }

    fn memory_access(&self) -> MemoryAccess {
        MemoryAccess::PageTables
    }

    async fn save(&mut self, file: OwnedFd) -> Result<SavedMemory, ControlError> {
        fs::File::from(file)
            .write_all(DEVICE_STATE)
            .map_err(failed("save the device state"))?;
        Ok(SavedMemory::PageTables)
    }

    async fn load(&mut self, file: OwnedFd) -> Result<(), ControlError> {
        let mut state = Vec::new();
        fs::File::from(file)
            .read_to_end(&mut state)
            .map_err(failed("load the device state"))?;
        if state == DEVICE_STATE {
            return Ok(());
        }
        Err(ControlError::Failed {
            step: "load the device state",
            reason: "the file was not saved by the fake driver".to_owned(),
        })
    }

    async fn switch_disk(&mut self, overlay: OwnedFd) -> Result<(), ControlError> {
        drop(overlay);
        Ok(())
    }

    async fn wait(&mut self) -> MachineExit {
        use std::os::unix::process::ExitStatusExt as _;
        if let Some(exit) = &self.exit {
            return exit.clone();
        }
        let exit = match self.child.wait().await {
            Ok(status) => match status.signal() {
                Some(signal) => MachineExit::Killed { signal },
                None => MachineExit::Exited {
                    code: status.code().unwrap_or(-1),
                },
            },
            Err(_) => MachineExit::Exited { code: -1 },
        };
        self.exit = Some(exit.clone());
        exit
    }

    async fn stop(&mut self, deadline: Duration) -> Result<(), StopError> {
        match timeout(deadline, self.child.kill()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(StopError {
                pid: self.pid,
                deadline,
            }),
        }
    }
}
