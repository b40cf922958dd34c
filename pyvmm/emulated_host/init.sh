#!/bin/busybox sh
# The init of the emulated host. Its shell is busybox's, which has all the programs used here built
# in. /modules/root and /modules/kvm (in load order) lie beside it in the initramfs; see
# initramfs.py.
# The shell finds its built-in programs by /proc/self/exe, so not the first one.
/bin/busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# Guests in small pages would boot a fifth slower. Monitors ask for huge ones where they are allowed.
echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled

load() {
    while read -r module; do insmod "/modules/$module.ko"; done <"/modules/$1"
}

# The command needs /dev/kvm only after its root is there: use the second CPU meanwhile.
{ load kvm; : >/kvm.loaded; } &
kvm_loader=$!
load root

control_port=/dev/vport0p4
until [ -c "$control_port" ]; do sleep 0.01; done
exec 9<>"$control_port"
# Blocks until this port is connected, and so those before it.
echo ready >&9
(
    until [ -e /kvm.loaded ]; do sleep 0.01; done
    # What a saved state needs: KVM is there, and VMGenID's driver.
    if [ -c /dev/kvm ] && [ -e /sys/bus/acpi/drivers/vmgenid/QEMUVGID:00 ]; then
        echo loaded >&9
    else
        echo unfit >&9
    fi
) &
# Here a state is saved (saved_state.py), to go on from in each run: all before this is the same for
# all of them.
read -r go <&9
echo awake >&9
read -r length <&9
dd bs="$length" count=1 iflag=fullblock of=/run.sh <&9 2>/dev/null
. /run.sh
if [ "$RESTORED" = 1 ]; then
    date -s "@$NOW" >/dev/null
    # Devices of this run, which were not there when the state was saved.
    echo 1 >/sys/bus/pci/rescan
    # Nothing runs before the kernel has taken this run's VMGenID for its random numbers.
    until dmesg | grep -q 'crng reseeded due to virtual machine fork'; do sleep 0.01; done
fi
echo up >&9

mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro machine /lower
mount -t tmpfs -o mode=755 tmpfs /upper
mkdir /upper/changes /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work overlay /root
if [ "$FOREIGN" = 1 ]; then
    # Another architecture's programs and libraries in the place of the machine's own, which are
    # still below /run/machine. Where / has links to /usr they lead to the right ones.
    mkdir -p /root/run/machine
    mount --bind /root /root/run/machine
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro programs /lower
    mount --bind /lower/usr /root/usr
    for folder in bin sbin lib; do
        [ -L "/root/$folder" ] || mount --bind "/root/usr/$folder" "/root/$folder"
    done
fi
mkdir -p /dev/pts /dev/shm /dev/.pyvmm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
cp /bin/busybox /run.sh /command.sh /dev/.pyvmm/
echo "$HOST_NAME" >/proc/sys/kernel/hostname
ifconfig lo 127.0.0.1 up
mount --bind /proc /root/proc
mount --move /sys /root/sys
mount --move /dev /root/dev

wait "$kvm_loader"
cd /root || exit
mount --move . /
# Descriptor 9 stays the control port, which can be opened only once.
exec chroot . /dev/.pyvmm/busybox sh /dev/.pyvmm/command.sh
