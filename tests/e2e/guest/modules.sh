# Uses drivers that no kernel of the template has built in, so each use loads modules. Leaves nothing behind.
set -e
cd "$(mktemp -d)"

# Device nodes exist before their drivers.
test -c /dev/fuse && test -c /dev/net/tun && test -c /dev/loop-control && test -b /dev/loop0
test "$(stat -c %a /dev/fuse /dev/net/tun | sort -u)" = 666

# By mount(2).
mkdir lower upper work merged
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
echo text > merged/file
test -e upper/file
umount merged

# By a device, and a file system on it.
truncate -s 16M disk
mkfs.ext4 -q disk
mkdir mounted
mount -o loop disk mounted
umount mounted

# By netlink.
ip link add wrenn-br type bridge
ip link add wrenn-a type veth peer name wrenn-b
ip link set wrenn-a master wrenn-br
ip link add wrenn-d type dummy
ip tuntap add dev wrenn-t mode tun
for link in wrenn-a wrenn-br wrenn-d wrenn-t; do ip link del "$link"; done

# Packet filters of both kinds.
nft 'add table inet wrenn { chain c { type filter hook input priority 0; ct state established accept; }; }'
nft delete table inet wrenn
iptables -t nat -A POSTROUTING -s 10.99.0.0/24 -m comment --comment wrenn -j MASQUERADE
iptables -t nat -D POSTROUTING -s 10.99.0.0/24 -m comment --comment wrenn -j MASQUERADE

# By a program.
modprobe -a br_netfilter wireguard nbd
lsmod | grep -q '^overlay '

# Every module of the kernel's package has an entry in the index.
find "/lib/modules/$(uname -r)/kernel" -name '*.ko' | wc -l
grep -c '\.ko:' "/lib/modules/$(uname -r)/modules.dep"
