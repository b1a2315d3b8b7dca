#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a machine ready for the demo and the tests, or says what it lacks.
#
#   test/setup.sh       everything: the Go toolchain, root, programs, the kernel
#   test/setup.sh go    the Go toolchain only
#
# On Debian and Ubuntu missing programs are installed. It prints nothing if
# nothing is to be done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
	printf 'setup: %s\n' "$@" >&2
	exit 1
}

check_go() {
	local wanted
	wanted=$(awk '$1 == "go" { print $2 }' go.mod)
	command -v go >/dev/null ||
		die "Go is not installed (or not in PATH): Go $wanted or newer is needed, see go.dev/doc/install"
	# Fails if this Go is too old and may not or cannot fetch a newer one.
	go list -m >/dev/null 2>&1 ||
		die "Go $wanted or newer is needed, this is $(GOTOOLCHAIN=local go version 2>&1 | head -n 1): see go.dev/doc/install"
}

# The program (or file) that is looked for, and the package that has it.
needs() {
	cat <<-'END'
		podman podman
		runc runc
		conmon conmon
		skopeo skopeo
		buildah buildah
		fusermount3 fuse3
		mkfs.erofs erofs-utils
		mkfs.xfs xfsprogs
		mke2fs e2fsprogs
		qemu-system-x86_64 qemu-system-x86
		debootstrap debootstrap
		newuidmap uidmap
		systemd-analyze systemd
		make make
		gcc gcc
		/usr/include/zlib.h zlib1g-dev
		git git
		/usr/include/stdlib.h libc6-dev
		/etc/ssl/certs/ca-certificates.crt ca-certificates
		/usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
	END
}

# missing prints column $1 of what is needed and not there.
missing() {
	local what package
	while read -r what package; do
		case $what in
		/*) [ -e "$what" ] || ! command -v apt-get >/dev/null && continue ;; # Debian's names
		*) command -v "$what" >/dev/null && continue ;;
		esac
		if [ "$1" = 1 ]; then echo "$what"; else echo "$package"; fi
	done < <(needs)
}

install_programs() {
	local packages
	mapfile -t packages < <(missing 2)
	[ ${#packages[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null ||
		die "these are missing, and this is not Debian or Ubuntu: $(missing 1 | xargs)" \
			"install them with this system's package manager, then run the command again"
	echo "setup: installing ${packages[*]}" >&2
	local log
	log=$(mktemp)
	export DEBIAN_FRONTEND=noninteractive
	if ! { apt-get -q update && apt-get -q -y --no-install-recommends install "${packages[@]}"; } >"$log" 2>&1 </dev/null; then
		tail -n 30 "$log" >&2
		die "apt-get could not install ${packages[*]}; all it said is in $log"
	fi
	rm -f "$log"
	[ -z "$(missing 1)" ] || die "still missing after installing ${packages[*]}: $(missing 1 | xargs)"
}

check_kernel() {
	local fs
	for fs in erofs overlay fuse; do
		grep -qw "$fs" /proc/filesystems || modprobe -q "$fs" 2>/dev/null || true
		grep -qw "$fs" /proc/filesystems ||
			die "the kernel $(uname -r) has no $fs: install the package with its modules (Debian: linux-image-$(dpkg --print-architecture 2>/dev/null || uname -m))"
	done
	[ -c /dev/fuse ] ||
		die "/dev/fuse is missing: run this on the host, or give the container the device and CAP_SYS_ADMIN"
}

PATH=$PATH:/usr/sbin:/sbin
check_go
[ "${1-}" = go ] && exit 0
[ "$(id -u)" = 0 ] || die "run this as root: it mounts file systems and starts containers"
install_programs
check_kernel
