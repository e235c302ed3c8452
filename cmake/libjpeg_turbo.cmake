# libjpeg-turbo as a static library, from its source. Its own build does not allow add_subdirectory.
#
#   SDPNET_LIBJPEG_TURBO_ARCHIVE=FILE   the source, for machines that do not reach its address. The checksum decides.

include(ExternalProject)

set(libjpeg_turbo_version 3.2.0)
set(libjpeg_turbo_sha256 980dd81f425082aa6d7c9e47fef27554ce7a9ffc8e2f6e863b97d263c5c50858)
set(libjpeg_turbo_address "https://github.com/libjpeg-turbo/libjpeg-turbo/archive/refs/tags/${libjpeg_turbo_version}.tar.gz")
set(libjpeg_turbo_url "${libjpeg_turbo_address}")
set(SDPNET_LIBJPEG_TURBO_ARCHIVE "" CACHE STRING "libjpeg-turbo-${libjpeg_turbo_version}.tar.gz, if it was downloaded before")
if(SDPNET_LIBJPEG_TURBO_ARCHIVE)
  set(libjpeg_turbo_url "${SDPNET_LIBJPEG_TURBO_ARCHIVE}")
endif()

# Without an assembler libjpeg-turbo would build all the same, and decode at a third of its speed.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  find_program(nasm NAMES nasm yasm)
  if(NOT nasm)
    message(FATAL_ERROR "libjpeg-turbo's fast code for x86-64 needs the assembler nasm (Debian: nasm).")
  endif()
endif()

set(libjpeg_turbo_prefix "${CMAKE_CURRENT_BINARY_DIR}/libjpeg-turbo")
set(libjpeg_turbo_library "${libjpeg_turbo_prefix}/lib/libjpeg.a")
set(libjpeg_turbo_toolchain)
if(CMAKE_TOOLCHAIN_FILE)
  set(libjpeg_turbo_toolchain "-DCMAKE_TOOLCHAIN_FILE=${CMAKE_TOOLCHAIN_FILE}")
endif()

ExternalProject_Add(
  libjpeg_turbo
  URL "${libjpeg_turbo_url}"
  URL_HASH "SHA256=${libjpeg_turbo_sha256}"
  DOWNLOAD_EXTRACT_TIMESTAMP FALSE
  CMAKE_ARGS
    ${libjpeg_turbo_toolchain}
    "-DCMAKE_INSTALL_PREFIX=${libjpeg_turbo_prefix}"
    -DCMAKE_INSTALL_LIBDIR=lib
    -DCMAKE_BUILD_TYPE=Release
    -DCMAKE_POSITION_INDEPENDENT_CODE=ON
    -DENABLE_SHARED=OFF
    -DENABLE_STATIC=ON
    -DREQUIRE_SIMD=ON
    -DWITH_TESTS=OFF
    -DWITH_TOOLS=OFF
    -DWITH_TURBOJPEG=OFF
  BUILD_BYPRODUCTS "${libjpeg_turbo_library}"
  LOG_CONFIGURE TRUE
  LOG_BUILD TRUE
  LOG_INSTALL TRUE
  LOG_OUTPUT_ON_FAILURE TRUE
)

file(MAKE_DIRECTORY "${libjpeg_turbo_prefix}/include") # must exist when the target below is made
add_library(libjpeg STATIC IMPORTED)
set_target_properties(
  libjpeg PROPERTIES IMPORTED_LOCATION "${libjpeg_turbo_library}"
                     INTERFACE_INCLUDE_DIRECTORIES "${libjpeg_turbo_prefix}/include"
)
add_dependencies(libjpeg libjpeg_turbo)

# Its licences go with the binary, and a list of what is in it for scanners (an SBOM, where PEP 770 has it).
configure_file(libjpeg-turbo.cdx.json.in libjpeg-turbo.cdx.json @ONLY)
if(SKBUILD_METADATA_DIR)
  install(FILES "${libjpeg_turbo_prefix}/share/doc/libjpeg-turbo/LICENSE.md"
          DESTINATION "${SKBUILD_METADATA_DIR}/licenses" RENAME LICENSE-libjpeg-turbo.md)
  install(FILES "${libjpeg_turbo_prefix}/share/doc/libjpeg-turbo/README.ijg"
          DESTINATION "${SKBUILD_METADATA_DIR}/licenses" RENAME README-libjpeg-turbo.ijg)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/libjpeg-turbo.cdx.json" DESTINATION "${SKBUILD_METADATA_DIR}/sboms")
endif()
