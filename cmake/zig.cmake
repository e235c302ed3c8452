# CMake toolchain: the C and C++ compiler of Zig (the package ziglang), which is given the version of glibc that the
# result must run with. ./dev wheel uses it: the tag manylinux_2_28 then holds on whatever system the wheel is built.
#
#   SDPNET_ZIG        Zig's program (environment)
#   SDPNET_GLIBC      the version of glibc (environment); 2.28 by default
#   SDPNET_MACHINE    the processor that the result is for (environment), x86_64 or aarch64; this machine's by default

if(NOT DEFINED ENV{SDPNET_ZIG})
  message(FATAL_ERROR "SDPNET_ZIG must name Zig's program")
endif()
set(zig "$ENV{SDPNET_ZIG}")
set(glibc 2.28)
if(DEFINED ENV{SDPNET_GLIBC})
  set(glibc "$ENV{SDPNET_GLIBC}")
endif()
execute_process(COMMAND uname -m OUTPUT_VARIABLE own_machine OUTPUT_STRIP_TRAILING_WHITESPACE)
set(machine "${own_machine}")
if(DEFINED ENV{SDPNET_MACHINE})
  set(machine "$ENV{SDPNET_MACHINE}")
endif()
if(NOT machine STREQUAL own_machine)
  set(CMAKE_SYSTEM_NAME Linux) # this is what makes it a cross-compilation
  set(CMAKE_SYSTEM_PROCESSOR "${machine}")
endif()

# CMake's rules expect one program each.
set(tools "${CMAKE_CURRENT_BINARY_DIR}/zig-tools")
foreach(tool cc c++)
  set(program "${tools}/zig-${tool}")
  file(WRITE "${program}" "#!/bin/sh\nexec '${zig}' ${tool} -target ${machine}-linux-gnu.${glibc} \"$@\"\n")
  execute_process(COMMAND chmod +x "${program}")
endforeach()
foreach(tool ar ranlib)
  set(program "${tools}/zig-${tool}")
  file(WRITE "${program}" "#!/bin/sh\nexec '${zig}' ${tool} \"$@\"\n")
  execute_process(COMMAND chmod +x "${program}")
endforeach()

set(CMAKE_C_COMPILER "${tools}/zig-cc")
set(CMAKE_CXX_COMPILER "${tools}/zig-c++")
set(CMAKE_AR "${tools}/zig-ar" CACHE FILEPATH "" FORCE)
set(CMAKE_RANLIB "${tools}/zig-ranlib" CACHE FILEPATH "" FORCE)
# Undefined behaviour would otherwise end the process in builds without optimisation, such as CMake's checks.
set(CMAKE_C_FLAGS_INIT "-fno-sanitize=undefined")
set(CMAKE_CXX_FLAGS_INIT "-fno-sanitize=undefined")
