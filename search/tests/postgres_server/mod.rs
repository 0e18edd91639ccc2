//! A private PostgreSQL server in a temporary folder, from the system's own binaries.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "every test binary uses a part of this"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct Server {
    folder: tempfile::TempDir,
    bin: PathBuf,
    port: u16,
    process: Child,
}

impl Server {
    /// A running server, or `None` (said on stderr) where PostgreSQL is not installed.
    pub(crate) fn start() -> Option<Self> {
        let Some(bin) = binaries() else {
            eprintln!("SKIPPED: PostgreSQL's server is not installed");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        if is_root() {
            // The server refuses to run as root.
            let owner = Command::new("chown")
                .arg("postgres")
                .arg(folder.path())
                .status();
            assert!(owner.unwrap().success());
        }
        let data = folder.path().join("data");
        let made = as_postgres(&bin.join("initdb"))
            .args(["--auth=trust", "--username=postgres", "--no-sync", "-D"])
            .arg(&data)
            .current_dir("/")
            .stdout(Stdio::null())
            .status();
        assert!(made.unwrap().success(), "initdb failed");
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let process = serve(&bin, folder.path(), port);
        let server = Self {
            folder,
            bin,
            port,
            process,
        };
        server.wait();
        Some(server)
    }

    /// The address of a study.
    pub(crate) fn address(&self, study: &str) -> String {
        format!(
            "postgres://postgres@127.0.0.1:{}/postgres#{study}",
            self.port
        )
    }

    /// kill -9 of the server with all its processes, and a new one on the same data.
    pub(crate) fn kill_and_restart(&mut self) {
        self.kill();
        self.process = serve(&self.bin, self.folder.path(), self.port);
        self.wait();
    }

    /// The postmaster's children notice its death and end by themselves.
    fn kill(&mut self) {
        // First the loop around it, which would start another one.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let file = self.folder.path().join("data/postmaster.pid");
        if let Some(pid) = std::fs::read_to_string(&file)
            .ok()
            .and_then(|text| text.lines().next().map(str::to_owned))
        {
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
        }
    }

    fn wait(&self) {
        let begun = Instant::now();
        loop {
            let ready = Command::new(self.bin.join("pg_isready"))
                .args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()])
                .status();
            if ready.unwrap().success() {
                return;
            }
            assert!(
                begun.elapsed() < Duration::from_mins(2),
                "the server does not start"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn serve(bin: &Path, folder: &Path, port: u16) -> Child {
    // A predecessor's children may still be ending: the new postmaster refuses to start until they are gone.
    let script = format!(
        "for i in $(seq 200); do '{0}/postgres' -D '{1}/data' -p {port} -k '{1}' -c listen_addresses=127.0.0.1; sleep 0.1; done",
        bin.display(),
        folder.display()
    );
    as_postgres(Path::new("sh"))
        .args(["-c", &script])
        .current_dir("/")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn as_postgres(program: &Path) -> Command {
    if is_root() {
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                "--pdeathsig=KILL",
                "--",
            ])
            .arg(program);
        command
    } else {
        Command::new(program)
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

/// The newest installed version, where Debian puts it, or what is in PATH.
fn binaries() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .chain(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        ))
        .filter(|bin| {
            ["initdb", "postgres", "pg_isready"]
                .iter()
                .all(|program| bin.join(program).is_file())
        })
        .collect();
    versions.sort();
    versions.pop()
}
